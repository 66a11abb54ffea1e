"""Reads the database for streams, in a few threads with separate connections.

Any number of clients share these connections: under ASGI Django would open one for each request in
progress, and PostgreSQL refuses more than max_connections. If Django has a connection pool, they
are taken from it and returned after each read.
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

# Connecting costs several times as much as reading, so a connection is kept for a moment.
_IDLE_SECONDS = 1.0


async def arun(function: Callable[[], _T]) -> _T:
    """Call a function that reads the database. It can be called twice: see `_Threads`."""
    return await asyncio.wrap_future(_threads.submit(function))


def run(function: Callable[[], _T]) -> _T:
    """Like `arun`, for synchronous code. Waits for the result."""
    return _threads.submit(function).result()


def run_later(function: Callable[[], object]) -> None:
    """Like `arun`, without waiting for the result. Exceptions are lost."""
    _threads.submit(function)


class _Threads:
    """A few threads, whose database connections are open only while there is work.

    If a connection was lost since its last use, it is replaced and the function is called again.
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
                self._idle -= 1  # a waiting thread takes this job, or one that finishes earlier
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
        return_connections()


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
            pool.check()  # its other connections could be lost as well
    except BaseException:
        connections.close_all()
        raise
    return function()


def return_connections() -> None:
    """Return the connections that Django has lent this thread from its pools, if any.

    For threads that live longer than a request: pools are sized for requests.
    """
    for wrapper in _open_connections():
        if _pools([wrapper]) and not wrapper.in_atomic_block:
            wrapper.close()


def _open_connections() -> list[BaseDatabaseWrapper]:
    return [wrapper for wrapper in connections.all(True) if wrapper.connection is not None]


def _pools(wrappers: list[BaseDatabaseWrapper]) -> list[Any]:
    """The pools of ``OPTIONS={"pool": …}``, which PostgreSQL's wrappers have."""
    pools = [getattr(wrapper, "pool", None) for wrapper in wrappers]
    return [pool for pool in pools if pool is not None]


_threads = _Threads()


def _forget_parent() -> None:
    """Begin with new threads in a process that was forked, which has none of the old ones."""
    global _threads
    _threads = _Threads()


os.register_at_fork(after_in_child=_forget_parent)
