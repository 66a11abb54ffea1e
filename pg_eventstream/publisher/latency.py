"""Measures how long events take until they are sequenced and published, for Prometheus.

The clocks of two machines are never compared: the database says how old an event is when it is
read, and from then on this process's own clock counts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence

from .. import instruments
from ..stream_event import Row

# The age of an event, and its age when it was sequenced. Both are null if an older trigger has
# written it. The second is 0 if the sequencing transaction began before the commit.
_EVENT_COLUMNS = """,
    extract(epoch FROM statement_timestamp() - s.committed_at)::float8 AS age,
    greatest(0, extract(epoch FROM s.sequenced_at - s.committed_at))::float8 AS sequencing
"""
_PAGE_COLUMNS = ["age", "sequencing"]


class Latency:
    """Counts the events that a feed publishes, and observes how long they took.

    A time that it observes is never too low, and too high by no more than the time of a query.
    ``is_first`` is true for one feed only, which also observes how long sequencing took.
    """

    def __init__(self, proxy: str, *, is_first: bool) -> None:
        self._is_first = is_first
        #: When the events that are read, but not published yet, were committed, by their positions.
        self._committed: deque[tuple[int, float]] = deque()
        self._published = instruments.published_events.labels(proxy)
        self._batches = instruments.batch_events.labels(proxy)
        self._seconds = instruments.commit_to_publish_seconds.labels(proxy)
        #: What the page selects of each event's place ``s``, and of these for `note`.
        self.event_columns = _EVENT_COLUMNS if instruments.INSTALLED else ""
        self.page_columns = _PAGE_COLUMNS if instruments.INSTALLED else []

    def note(self, rows: Iterable[Sequence[float | None]], asked_at: float) -> None:
        """Take positions and `page_columns` of a page that was asked for at ``asked_at``."""
        if not self.page_columns:
            return
        sequencing = []
        for position, age, seconds in rows:
            if position is not None and age is not None and seconds is not None:
                self._committed.append((int(position), asked_at - age))
                sequencing.append(seconds)
        if self._is_first:
            instruments.commit_to_sequence_seconds.observe_all(sequencing)

    def published(self, rows: Sequence[Row]) -> None:
        """The proxy has just taken these rows, in the order of the page. Others can be left out."""
        self._published.inc(len(rows))
        self._batches.observe_all([len(rows)])
        if not self._committed:
            return
        now, seconds = time.monotonic(), []
        for row in rows:
            while self._committed and self._committed[0][0] < row.position:
                self._committed.popleft()
            if self._committed and self._committed[0][0] == row.position:
                seconds.append(now - self._committed.popleft()[1])
        self._seconds.observe_all(seconds)

    def forget(self) -> None:
        """Forget the rows that were read and not published."""
        self._committed.clear()
