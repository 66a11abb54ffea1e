"""Hints that follow what was published, for streams that may have missed it."""

from __future__ import annotations

import heapq
from collections import Counter

from ..limits import LIMITS, Limits
from ..stream_event import PermissionChange
from .items import HINT, Batch, hint


class Hints:
    """Hints that are to follow what was published: soon, and once more a little later.

    After a burst: for a session whose client reads slowly, or which is just fetching its next
    link, Pushpin queues 100 items and drops what follows (src/handler/httpsession.cpp,
    PUBLISH_QUEUE_MAX). The channel's next event shows the gap, and the session fetches what it
    missed; but there may be none for long, so a hint takes its place. An event in time puts it
    off, since a stream sends nothing while it fetches (for up to 0.1 s).

    After a change of permission: a stream that was just being opened may have been allowed
    before the change, and held after its hint was published.

    After an event in whose place a hint was published: a stream that was just being opened, or
    fetching its next link, may have been read before the event, and held after the hint.

    After the first event of a channel in an incarnation of the stream: a stream that holds an id
    which is lost would otherwise get its reset only when the proxy gives up waiting for what comes
    before the event, after 5 seconds (src/handler/sequencer.cpp).
    """

    _WINDOW_SECONDS, _AFTER = 1.0, (0.5, 5.0)

    def __init__(self, limits: Limits = LIMITS) -> None:
        self._burst = limits.burst
        self._counts: Counter[str] = Counter()
        self._window_end = 0.0
        #: When the next one is due, and how many there were.
        self._due: dict[bytes, tuple[float, int]] = {}
        #: The same in the order of time. Those that were put off stand at their old place as well.
        self._queue: list[tuple[float, bytes]] = []

    def note(self, batch: Batch, now: float) -> None:
        """This batch was published."""
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
                self._put_off(encoded, now)

    def follow(self, encoded: bytes, now: float) -> None:
        """This hint is to follow, as it does by itself what `note` finds to need one."""
        self._set(encoded, now + self._AFTER[0], 0)

    def _put_off(self, encoded: bytes, now: float) -> None:
        at, done = self._due[encoded]
        pause = self._AFTER[done] - (self._AFTER[done - 1] if done else 0)
        self._set(encoded, max(at, now + pause), done)

    def _set(self, encoded: bytes, at: float, done: int) -> None:
        self._due[encoded] = (at, done)
        heapq.heappush(self._queue, (at, encoded))

    def next_due(self) -> float | None:
        """When the next hint is due, None if there is none to come."""
        while self._queue:
            at, encoded = self._queue[0]
            if encoded in self._due and self._due[encoded][0] == at:
                return at
            heapq.heappop(self._queue)
        return None

    def take_due(self, now: float) -> list[bytes]:
        """The items of the hints that are due now."""
        due = []
        while (at := self.next_due()) is not None and at <= now:
            _, encoded = heapq.heappop(self._queue)
            due.append((encoded, *self._due.pop(encoded)))
        for encoded, at, done in due:
            if done + 1 < len(self._AFTER):
                self._set(encoded, at + self._AFTER[done + 1] - self._AFTER[done], done + 1)
        return [encoded for encoded, _, _ in due]
