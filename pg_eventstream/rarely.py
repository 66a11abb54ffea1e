"""Limits how often a warning is logged that any request could cause."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Hashable

#: The minimum time between two warnings of the same kind in one process.
SECONDS = 600.0


class Rarely:
    """A callable that returns True at most once per ``seconds`` for each of a few reasons."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._next: dict[Hashable, float] = {}
        os.register_at_fork(after_in_child=self._forget_parent)

    def __call__(self, reason: Hashable = None) -> bool:
        now = time.monotonic()
        with self._lock:
            if now < self._next.get(reason, now):
                return False
            self._next[reason] = now + self._seconds
            return True

    def _forget_parent(self) -> None:
        self._lock = threading.Lock()  # a thread of the parent may have held the old one
