"""How long events take until they are sequenced and published, for Prometheus and for traces.

The clocks of two machines are never compared: the database says what time it is there when it is
asked for events, and from then on this process's own clock counts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import instruments, tracing
from ..stream_event import Row, StreamEvent

# The age of an event ``e`` with its place ``s``, null if an older trigger has put it into the
# outbox, and the time from its commit until it was put in order. Both are in microseconds, because
# psycopg reads whole numbers faster. The transaction that sequenced it can have begun before the
# commit.
_AGES = """,
    (extract(epoch FROM statement_timestamp() - s.committed_at) * 1000000)::bigint AS age,
    (greatest(0, extract(epoch FROM s.sequenced_at - s.committed_at)) * 1000000)::bigint
    AS sequencing
"""
_AGE_NAMES = ["age", "sequencing"]
_TRACE = """,
    extract(epoch FROM statement_timestamp())::float8 AS asked,
    extract(epoch FROM e.created)::float8 AS created,
    e.meta ->> 'traceparent' AS traceparent, e.meta ->> 'tracestate' AS tracestate
"""
_TRACE_NAMES = ["asked", "created", "traceparent", "tracestate"]


class _Trace(NamedTuple):
    """The trace of an event, and its times by the clock of the database.

    ``ahead`` is what to add to `time.monotonic` to get such a time.
    """

    created: float
    committed: float
    sequenced: float
    ahead: float
    carrier: dict[str, str]


@dataclass(slots=True)
class _Page:
    """The rows of a page, in their order."""

    asked_at: float
    positions: list[int]
    ages: list[int | None]
    traces: list[_Trace | None] | None
    #: How many of them are published or left out.
    done: int = 0

    def take(self, rows: Sequence[Row]) -> Sequence[int]:
        """The indexes of these rows, which are now done."""
        first, last = rows[0].position, rows[-1].position
        start, end = self.done, self.done + len(rows)
        next_ones = self.positions[start:end]
        if (next_ones[:1], next_ones[-1:], len(next_ones)) == ([first], [last], len(rows)):
            self.done = end
            return range(start, end)
        # Some were refused, or these rows are of another stream.
        wanted = {row.position for row in rows}
        found = [n for n in range(start, len(self.positions)) if self.positions[n] in wanted]
        if found:
            self.done = found[-1] + 1
        return found


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
        #: The pages that are read, but not published completely.
        self._pages: deque[_Page] = deque()
        traces = tracing.is_on()
        self._is_on = traces or instruments.INSTALLED
        #: What the page selects of each event, and the names of these columns, for `note`.
        self.columns = (_AGES if self._is_on else "") + (_TRACE if traces else "")
        self.names = (_AGE_NAMES if self._is_on else []) + (_TRACE_NAMES if traces else [])

    def note(self, rows: Sequence[tuple[Any, ...]], first: int, asked_at: float) -> None:
        """Take a page that was asked for at ``asked_at``. `columns` begin at index ``first``.

        Each row has its position at index 4. A lot of events are read at once, so this makes no
        object for each of them.
        """
        if not self._is_on:
            return
        positions = [row[4] for row in rows]
        ages = [row[first] for row in rows]
        traces = None
        if len(self.names) > len(_AGE_NAMES):
            traces = [_trace(asked_at, *row[first:]) for row in rows]
        self._pages.append(_Page(asked_at, positions, ages, traces))
        if self._is_first:
            seconds = [row[first + 1] / 1e6 for row in rows if row[first] is not None]
            instruments.commit_to_sequence_seconds.observe_all(seconds)

    def published(self, rows: Sequence[Row]) -> None:
        """The proxy has just taken these rows, in the order of the pages. Others can be left out.

        They are of one page.
        """
        self._published.inc(len(rows))
        self._batches.observe_all([len(rows)])
        pages, last = self._pages, rows[-1].position
        while pages and pages[0].positions[-1] < last:
            pages.popleft()
        if not pages:
            return
        page, now = pages[0], time.monotonic()
        ahead = now - page.asked_at
        taken = page.take(rows)
        ages = [page.ages[n] for n in taken]
        self._seconds.observe_all([ahead + age / 1e6 for age in ages if age is not None])
        if page.traces is not None:
            by_position = {row.position: row for row in rows}
            for n in taken:
                trace, row = page.traces[n], by_position[page.positions[n]]
                if trace is not None and isinstance(row, StreamEvent):
                    self._record(trace, row, now + trace.ahead)
        if page.positions[-1] == last:
            pages.popleft()

    def forget(self) -> None:
        """Forget the rows that were read and not published."""
        self._pages.clear()

    def _record(self, trace: _Trace, event: StreamEvent, published: float) -> None:
        """Record the spans of an event."""
        about = {
            "messaging.system": "pg_eventstream",
            "messaging.destination.name": event.channel,
            "messaging.message.id": f"{event.channel}:{event.number}",
        }
        carrier = trace.carrier
        if self._is_first:
            tracing.record("commit", carrier, trace.created, trace.committed, about)
            tracing.record("sequence", carrier, trace.committed, trace.sequenced, about)
        about["pg_eventstream.proxy"] = self._proxy
        tracing.record("publish", carrier, trace.sequenced, published, about)


def _trace(
    asked_at: float,
    age: int | None,
    sequencing: int,
    asked: float,
    created: float,
    parent: str | None,
    state: str | None,
) -> _Trace | None:
    if parent is None or age is None:
        return None
    committed = asked - age / 1e6
    carrier = {"traceparent": parent, "tracestate": state or ""}
    return _Trace(created, committed, committed + sequencing / 1e6, asked - asked_at, carrier)
