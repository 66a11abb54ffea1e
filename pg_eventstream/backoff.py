"""The delay before the next try."""

from __future__ import annotations

import random


class Backoff:
    """The delays of a loop that retries: each is twice as long as the one before it.

    ``first`` and ``longest`` are in seconds.
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first, self._longest = first, longest
        self.reset()

    def reset(self) -> None:
        """Begin with the first delay again, after a success."""
        self._next = self._first

    def at_most(self, seconds: float) -> None:
        """Limit the next delay to ``seconds``."""
        self._next = min(self._next, seconds)

    def next(self) -> float:
        """The seconds to wait now, with jitter so that processes do not retry in step."""
        delay = self._next
        self._next = min(delay * 2, self._longest)
        return delay * random.uniform(0.5, 1.0)  # noqa: S311
