"""Reads the database for streams, in a few threads with connections of their own.

However many clients come at once, they share these connections: under ASGI Django would open
one for each request that it works on, and PostgreSQL refuses more than max_connections. Where
Django has a pool of them, they are its own, and go back after each read.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from django.db import InterfaceError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

_T = TypeVar("_T")

# To connect costs several times what the reading does, so a connection is kept for a moment.
_IDLE_SECONDS = 1.0


async def arun(function: Callable[[], _T]) -> _T:
    """Call a function that reads the database. It may be called twice: see `_Threads`."""
    return await asyncio.wrap_future(_threads.submit(function))


def run(function: Callable[[], _T]) -> _T:
    """The same, for synchronous code; waits for the result."""
    return _threads.submit(function).result()


def run_later(function: Callable[[], object]) -> None:
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
    try:
        return _call_again_if_lost(function)
    finally:
        give_back()


def _call_again_if_lost(function: Callable[[], _T]) -> _T:
    was_open = _open_connections() != []
    try:
        return function()
    except (OperationalError, InterfaceError):
        pools = _pools(_open_connections())
        connections.close_all()
        if not was_open and not pools:
            raise
        for pool in pools:
            pool.check()  # of the others in it, which may be lost as well
    except BaseException:
        connections.close_all()
        raise
    return function()


def give_back() -> None:
    """Let go of the connections that Django has lent this thread from its pools, if it has any.

    For threads that live longer than a request: a pool is as large as the requests need it.
    """
    for wrapper in _open_connections():
        if _pools([wrapper]) and not wrapper.in_atomic_block:
            wrapper.close()


def _open_connections() -> list[BaseDatabaseWrapper]:
    return [wrapper for wrapper in connections.all(True) if wrapper.connection is not None]


def _pools(wrappers: list[BaseDatabaseWrapper]) -> list[Any]:
    """Those of ``OPTIONS={"pool": …}``, which PostgreSQL's wrappers have."""
    pools = [getattr(wrapper, "pool", None) for wrapper in wrappers]
    return [pool for pool in pools if pool is not None]


_threads = _Threads()


def _forget_parent() -> None:
    """In a process that was forked: it has none of the threads."""
    global _threads
    _threads = _Threads()


os.register_at_fork(after_in_child=_forget_parent)
