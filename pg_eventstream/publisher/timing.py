"""How long events take until they are sequenced and published, for Prometheus and for traces.

The clocks of two machines are never compared: the database says what time it is there when it is
asked for events, and from then on this process's own clock counts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .. import instruments, tracing
from ..stream_event import Row, StreamEvent

# The times of an event ``e`` with its place ``s`` in seconds, and its trace. The time of its commit
# is null if an older trigger has put it into the outbox.
_TIMES = """,
    extract(epoch FROM e.created)::float8 AS created,
    extract(epoch FROM s.committed_at)::float8 AS committed,
    extract(epoch FROM s.sequenced_at)::float8 AS sequenced,
    extract(epoch FROM statement_timestamp())::float8 AS asked
"""
_TRACE = ", e.meta ->> 'traceparent' AS traceparent, e.meta ->> 'tracestate' AS tracestate"
_NAMES = ["created", "committed", "sequenced", "asked"]
_TRACE_NAMES = ["traceparent", "tracestate"]


class _Times(NamedTuple):
    """Times of the database. ``ahead`` is what to add to `time.monotonic` to get one."""

    position: int
    created: float
    committed: float
    sequenced: float
    ahead: float
    trace: dict[str, str] | None


class Timing:
    """Counts the events that a feed publishes, and measures and traces how long they took.

    A time that it measures is never too low, and too high by no more than the time of a query.
    ``is_first`` is true for one feed only, which also does so for what happened before publishing.
    """

    def __init__(self, proxy: str, *, is_first: bool) -> None:
        self._proxy = proxy
        self._is_first = is_first
        self._published = instruments.published_events.labels(proxy)
        self._batches = instruments.batch_events.labels(proxy)
        self._seconds = instruments.commit_to_publish_seconds.labels(proxy)
        #: The events that are read, but not published yet, by their positions.
        self._pending: deque[_Times] = deque()
        traces = tracing.is_on()
        self._is_on = traces or instruments.INSTALLED
        #: What the page selects of each event, and the names of these columns, for `note`.
        self.columns = (_TIMES if self._is_on else "") + (_TRACE if traces else "")
        self.names = (_NAMES if self._is_on else []) + (_TRACE_NAMES if traces else [])

    def note(self, rows: Iterable[tuple[int, Sequence[Any]]], asked_at: float) -> None:
        """Take the positions and `columns` of a page that was asked for at ``asked_at``."""
        if not self._is_on:
            return
        seconds = []
        for position, (created, committed, sequenced, asked, *trace) in rows:
            if committed is None:
                continue
            # The transaction that sequenced it can have begun before the commit.
            sequenced = max(committed, sequenced)
            seconds.append(sequenced - committed)
            carrier = None
            if trace and trace[0] is not None:
                carrier = {"traceparent": trace[0], "tracestate": trace[1] or ""}
            ahead = asked - asked_at
            self._pending.append(_Times(position, created, committed, sequenced, ahead, carrier))
        if self._is_first:
            instruments.commit_to_sequence_seconds.observe_all(seconds)

    def published(self, rows: Sequence[Row]) -> None:
        """The proxy has just taken these rows, in the order of the page. Others can be left out."""
        self._published.inc(len(rows))
        self._batches.observe_all([len(rows)])
        now, seconds = time.monotonic(), []
        for row in rows:
            while self._pending and self._pending[0].position < row.position:
                self._pending.popleft()
            if self._pending and self._pending[0].position == row.position:
                times = self._pending.popleft()
                seconds.append(now + times.ahead - times.committed)
                if times.trace is not None and isinstance(row, StreamEvent):
                    self._record(times, times.trace, row, now + times.ahead)
        self._seconds.observe_all(seconds)

    def forget(self) -> None:
        """Forget the rows that were read and not published."""
        self._pending.clear()

    def _record(
        self, times: _Times, trace: dict[str, str], event: StreamEvent, published: float
    ) -> None:
        """Record the spans of an event."""
        about = {
            "messaging.system": "pg_eventstream",
            "messaging.destination.name": event.channel,
            "messaging.message.id": f"{event.channel}:{event.number}",
        }
        if self._is_first:
            tracing.record("commit", trace, times.created, times.committed, about)
            tracing.record("sequence", trace, times.committed, times.sequenced, about)
        about["pg_eventstream.proxy"] = self._proxy
        tracing.record("publish", trace, times.sequenced, published, about)
