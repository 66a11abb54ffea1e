"""Reads the database for streams, in a few threads with connections of their own.

However many clients come at once, they share these connections: under ASGI Django would open
one for each request that it works on, and PostgreSQL refuses more than max_connections.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from django.db import InterfaceError, OperationalError, connections

_T = TypeVar("_T")

# To connect costs several times what the reading does, so a connection is kept for a moment.
_IDLE_SECONDS = 1.0


async def in_thread(function: Callable[[], _T]) -> _T:
    """Call a function that reads the database. It may be called twice: see `_Threads`."""
    return await asyncio.wrap_future(_threads.submit(function))


def in_other_thread(function: Callable[[], _T]) -> _T:
    """The same, for synchronous code; waits for the result."""
    return _threads.submit(function).result()


def in_background(function: Callable[[], object]) -> None:
    """The same, without waiting; what it raises is lost."""
    _threads.submit(function)


class _Threads:
    """A few threads, whose database connections are open only while there is work.

    One that was lost since its last use is replaced: the function is called once more.
    """

    _MOST = 4

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = self._idle = 0

    def submit(self, function: Callable[[], _T]) -> Future[_T]:
        result: Future[_T] = Future()

        def job() -> None:
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(_call(function))
                except BaseException as e:  # noqa: BLE001  (it is raised where it is awaited)
                    result.set_exception(e)

        with self._lock:
            if self._idle:
                self._idle -= 1  # one that waits takes this job, or one that is done before
            elif self._started < self._MOST:
                self._started += 1
                threading.Thread(
                    target=self._work, name="pg_eventstream reader", daemon=True
                ).start()
        self._jobs.put(job)
        return result

    def _work(self) -> None:
        while True:
            self._next_job()()

    def _next_job(self) -> Callable[[], None]:
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            with self._lock:
                self._idle += 1
        try:
            return self._jobs.get(timeout=_IDLE_SECONDS)
        except queue.Empty:
            connections.close_all()
            return self._jobs.get()


def _call(function: Callable[[], _T]) -> _T:
    was_open = any(wrapper.connection is not None for wrapper in connections.all(True))
    try:
        return function()
    except (OperationalError, InterfaceError):
        connections.close_all()
        if not was_open:
            raise
    except BaseException:
        connections.close_all()
        raise
    return function()


_threads = _Threads()
