"""Schedules hints that follow published events, for streams that might have missed them."""

from __future__ import annotations

import heapq
from collections import Counter

from ..limits import LIMITS, Limits
from ..stream_event import PermissionChange
from .items import HINT, Batch, hint


class Hints:
    """The hints that will follow published events: each is published soon, and once more later.

    After a burst: for a session whose client reads slowly or that is requesting its next link,
    Pushpin queues 100 items and drops the others (src/handler/httpsession.cpp, PUBLISH_QUEUE_MAX).
    The channel's next event reveals the gap, and the session fetches what it missed. Because the
    next event can be a long time away, a hint replaces it. An event that arrives in time postpones
    the hint, because a stream sends nothing while it fetches (for up to 0.1 s).

    After a permission change: a stream that was being opened could have been allowed before the
    change, and held after the change's hint was published.

    After an event that was replaced by a hint: a stream that was being opened or was requesting its
    next link could have been read before the event, and held after the hint.

    After the first event of a channel in an incarnation of the stream: otherwise a stream with an
    id that is lost would get its reset only after 5 seconds, when the proxy stops waiting for the
    item before the event (src/handler/sequencer.cpp).
    """

    _WINDOW_SECONDS, _AFTER = 1.0, (0.5, 5.0)

    def __init__(self, limits: Limits = LIMITS) -> None:
        self._burst = limits.burst
        self._counts: Counter[str] = Counter()
        self._window_end = 0.0
        #: For each hint, when it is due next and how many times it was published.
        self._due: dict[bytes, tuple[float, int]] = {}
        #: The same in the order of time. Postponed hints remain at their old time as well.
        self._queue: list[tuple[float, bytes]] = []

    def note(self, batch: Batch, now: float) -> None:
        """Schedule the hints for a batch that was published."""
        if now >= self._window_end:
            self._counts.clear()
            self._window_end = now + self._WINDOW_SECONDS
        channels = set()
        for row, encoded in zip(batch.rows, batch.items, strict=True):
            if isinstance(row, PermissionChange):
                self.follow(encoded, now)
            elif row.reliable:
                self._counts[row.channel] += 1
                channels.add(row.channel)
                if encoded.endswith(HINT):
                    self.follow(encoded, now)
                elif row.is_first_of_incarnation:
                    self.follow(hint(row.channel), now)
        for channel in channels:
            encoded = hint(channel)
            if self._counts[channel] >= self._burst:
                self.follow(encoded, now)
            elif encoded in self._due:
                self._postpone(encoded, now)

    def follow(self, encoded: bytes, now: float) -> None:
        """Schedule this hint."""
        self._set(encoded, now + self._AFTER[0], 0)

    def _postpone(self, encoded: bytes, now: float) -> None:
        at, done = self._due[encoded]
        pause = self._AFTER[done] - (self._AFTER[done - 1] if done else 0)
        self._set(encoded, max(at, now + pause), done)

    def _set(self, encoded: bytes, at: float, done: int) -> None:
        self._due[encoded] = (at, done)
        heapq.heappush(self._queue, (at, encoded))

    def next_due(self) -> float | None:
        """When the next hint is due; None if there is none."""
        while self._queue:
            at, encoded = self._queue[0]
            if encoded in self._due and self._due[encoded][0] == at:
                return at
            heapq.heappop(self._queue)
        return None

    def take_due(self, now: float) -> list[bytes]:
        """Remove and return the items of the hints that are due."""
        due = []
        while (at := self.next_due()) is not None and at <= now:
            _, encoded = heapq.heappop(self._queue)
            due.append((encoded, *self._due.pop(encoded)))
        for encoded, at, done in due:
            if done + 1 < len(self._AFTER):
                self._set(encoded, at + self._AFTER[done + 1] - self._AFTER[done], done + 1)
        return [encoded for encoded, _, _ in due]
