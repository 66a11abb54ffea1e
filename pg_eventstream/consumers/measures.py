"""Counts what a consumer does in this process, and how long it takes, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .. import instruments
from .reader import Page, Row

#: Histograms get so many values at once, or those of a second: one alone costs as much as many.
_AT_ONCE, _SECONDS = 100, 1.0


class Measures:
    """The counters and histograms of one consumer. Without prometheus-client, it does nothing.

    The clocks of two machines are never compared: the database says what time it is there when it
    is asked for a page, and from then on this process's own clock counts.
    """

    def __init__(self, name: str) -> None:
        self._is_on = instruments.INSTALLED
        self._handled = instruments.handled_events.labels(name)
        self._failed = instruments.failed_attempts.labels(name)
        self._parked = instruments.parked_events.labels(name)
        self._handler = instruments.handler_seconds.labels(name)
        self._latency = instruments.commit_to_handled_seconds.labels(name)
        #: What to add to `time.monotonic` to get the time of the database, in seconds since 1970.
        self._ahead = 0.0
        self._calls: list[float] = []
        self._ages: list[float] = []
        self._count = 0
        self._flush_at = 0.0

    def note(self, page: Page, asked_at: float) -> None:
        """A page was read, which was asked for at ``asked_at``, by `time.monotonic`."""
        self._ahead = page.asked - asked_at

    def called(self, seconds: Sequence[float]) -> None:
        """How long the handler took, for each call."""
        if self._is_on:
            self._calls += seconds

    def handled(self, rows: Sequence[Row]) -> None:
        """The transaction that handled these events is committed."""
        if not self._is_on:
            return
        moment = time.monotonic()
        now = moment + self._ahead
        self._count += len(rows)
        self._ages += [
            max(0.0, now - row.committed_at) for row in rows if row.committed_at is not None
        ]
        if self._count >= _AT_ONCE or moment >= self._flush_at:
            self.flush(moment)

    def tried_parked(self, *, is_handled: bool) -> None:
        """A parked event was tried again."""
        (self._handled if is_handled else self._failed).inc()

    def failed(self) -> None:
        self._failed.inc()

    def parked(self) -> None:
        self._parked.inc()

    def flush(self, now: float = 0.0) -> None:
        """Give what was measured to Prometheus."""
        self._flush_at = now + _SECONDS
        if self._count:
            self._handled.inc(self._count)
            self._count = 0
        if self._calls:
            self._handler.observe_all(self._calls)
            self._calls.clear()
        if self._ages:
            self._latency.observe_all(self._ages)
            self._ages.clear()
