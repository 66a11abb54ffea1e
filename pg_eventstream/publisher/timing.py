"""The times of each event on its way to the proxy, for traces.

All of them are by the clock of the database, so no clocks of two machines are compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .. import tracing
from ..stream_event import Row, StreamEvent

# The times of an event and its trace, and what the page selects of them.
_EVENT_COLUMNS = """,
    extract(epoch FROM e.created)::float8 AS created,
    extract(epoch FROM s.committed_at)::float8 AS committed,
    extract(epoch FROM s.sequenced_at)::float8 AS sequenced,
    e.meta ->> 'traceparent' AS traceparent, e.meta ->> 'tracestate' AS tracestate
"""
_PAGE_COLUMNS = """,
    created, committed, sequenced, traceparent, tracestate,
    extract(epoch FROM clock_timestamp())::float8
"""


class _Times(NamedTuple):
    """The last one is what to add to `time.monotonic` to get the time of the database."""

    created: float
    committed: float
    sequenced: float
    trace: dict[str, str]
    offset: float


class Timing:
    """Records the times of the events that one feed publishes, if anything is there to take them.

    ``is_first`` is true for one feed only, which also records what happened before publishing.
    """

    def __init__(self, proxy: str, *, is_first: bool) -> None:
        self._proxy = proxy
        self._is_first = is_first
        self._is_on = tracing.is_on()
        self._pending: dict[int, _Times] = {}
        #: What the page selects of each event ``e`` with its place ``s``, and of these for `note`.
        self.event_columns = _EVENT_COLUMNS if self._is_on else ""
        self.page_columns = _PAGE_COLUMNS if self._is_on else ""

    def note(self, rows: Iterable[tuple[int, Sequence[Any]]], asked_at: float) -> None:
        """Take positions and `page_columns` of a page that was asked for at ``asked_at``.

        The time of publishing is then at most too late by what the query took.
        """
        if not self._is_on:
            return
        for position, (created, committed, sequenced, parent, state, read) in rows:
            if parent is None:
                continue
            if committed is None:  # by an older trigger
                committed = created
            trace = {"traceparent": parent, "tracestate": state or ""}
            # The clock of one transaction may have been read before that of the other.
            sequenced = max(committed, sequenced)
            self._pending[position] = _Times(created, committed, sequenced, trace, read - asked_at)

    def published(self, rows: Iterable[Row]) -> None:
        """The proxy has just taken these rows."""
        if not self._is_on:
            return
        now = time.monotonic()
        for row in rows:
            times = self._pending.pop(row.position, None)
            if times is None or not isinstance(row, StreamEvent):
                continue
            attributes = {
                "messaging.system": "pg_eventstream",
                "messaging.destination.name": row.channel,
                "messaging.message.id": f"{row.channel}:{row.number}",
            }
            end = now + times.offset
            steps = [("publish", times.sequenced, end, {"pg_eventstream.proxy": self._proxy})]
            if self._is_first:
                steps += [
                    ("commit", times.created, times.committed, {}),
                    ("sequence", times.committed, times.sequenced, {}),
                ]
            for name, began, ended, more in steps:
                tracing.record(name, times.trace, began, ended, {**attributes, **more})

    def forget(self) -> None:
        """Forget the rows that were read and not published."""
        self._pending.clear()
