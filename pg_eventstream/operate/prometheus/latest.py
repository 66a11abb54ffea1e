"""The latest result of a function that reads the database, shared by concurrent callers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, TypeVar

from django.db import connections

_T = TypeVar("_T")


class Latest(Generic[_T]):
    """Calls a function on a thread, at most once at a time and once per ``seconds``.

    So any number of callers costs one read, and none waits longer than it wants to, even if the
    database does not answer.
    """

    def __init__(self, read: Callable[[], _T], seconds: float = 1.0) -> None:
        self._read = read
        self._seconds = seconds
        self._lock = threading.Lock()
        self._result: Future[_T] | None = None
        self._read_at = 0.0

    def get(self, patience: float) -> _T:
        """The result, or the exception that the function raised.

        Raises `TimeoutError` after ``patience`` seconds. The function then continues to run, and
        its result is for the next caller.
        """
        with self._lock:
            result = self._result
            is_old = time.monotonic() - self._read_at > self._seconds
            if result is None or (result.done() and is_old):
                result = self._result = Future()
                threading.Thread(
                    target=self._run, args=[result], name="pg_eventstream state", daemon=True
                ).start()
        try:
            return result.result(patience)
        except FutureTimeout as e:  # since Python 3.11 this is TimeoutError itself
            if result.done():
                raise  # the function's own
            raise TimeoutError(f"The database did not answer within {patience:g} seconds.") from e

    def _run(self, result: Future[_T]) -> None:
        try:
            found = self._read()
        except Exception as e:  # noqa: BLE001  (it is raised where it is awaited)
            self._read_at = time.monotonic()
            result.set_exception(e)
        else:
            self._read_at = time.monotonic()
            result.set_result(found)
        finally:
            connections.close_all()  # those of this thread
