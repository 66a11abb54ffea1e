"""Reads a page of the stream, once for all slots of a process."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import psycopg

from ..channels import reliable
from ..postgres.sequence import Cursor
from ..postgres.slots import SLOTS, slot_of
from ..sse import INCARNATION
from .declaration import Declaration
from .event import ConsumedEvent, event_id

Connection = psycopg.Connection[Any]

#: The events of a page, at most.
PAGE_EVENTS = 500
# Larger data are read when the event is handled.
_DATA_BYTES = 64_000

_PAGE = """
    SELECT * FROM pg_eventstream_consumer_page(
        %s, %s, %s, %s, %s, %s::text[], %s::text[], %s::int[])
"""

_DATA = """
    SELECT e.data
      FROM pg_eventstream_stream AS s JOIN pg_eventstream_event AS e ON e.id = s.event_id
     WHERE s.position = %s
"""


def positions_of_page(slots: int) -> int:
    """How many positions a page has that is read for so many slots.

    The fewer slots, the fewer of the events belong to them.
    """
    return PAGE_EVENTS * min(8, SLOTS // (slots or SLOTS))


@dataclass(slots=True)
class Row:
    """An event of the stream that a consumer has to handle. ``data`` is None if it is large."""

    slot: int
    position: int
    channel: str
    number: int
    type: str
    data: str | None
    meta: str | None
    #: Seconds since 1970.
    created: float
    committed_at: float | None

    def event(self, data: str, *, replayed: bool, attempt: int) -> ConsumedEvent:
        return make_event(
            self.channel,
            self.number,
            self.type,
            data,
            self.meta,
            self.position,
            datetime.fromtimestamp(self.created, timezone.utc),
            None
            if self.committed_at is None
            else datetime.fromtimestamp(self.committed_at, timezone.utc),
            replayed=replayed,
            attempt=attempt,
        )


@dataclass(frozen=True, slots=True)
class Page:
    """The events of some positions, and what was stored about the consumer at the same moment."""

    rows: list[Row]
    #: The last position of the page.
    last: int
    #: Whether there are no more.
    is_last: bool
    cursor: Cursor
    #: The consumer's present name. None if it was removed.
    name: str | None
    epoch: int
    paused: bool
    #: By slot, the last position that was pruned before it was handled.
    lost: dict[int, int]
    #: The time of the database when it was asked, in seconds since 1970.
    asked: float


def read_page(
    connection: Connection,
    consumer: Declaration,
    consumer_id: int,
    after: int,
    slots: Collection[int],
) -> Page:
    """Read the events after a position that belong to the slots."""
    limit = positions_of_page(len(slots))
    (first, *_), *events = (
        psycopg.Cursor(connection)  # Django's own would put the values into the text
        .execute(
            _PAGE,
            [
                consumer_id,
                after,
                limit,
                PAGE_EVENTS,
                _DATA_BYTES,
                list(consumer.channels),
                list(consumer.prefixes),
                None if len(slots) == SLOTS else list(slots),
            ],
            binary=True,
        )
        .fetchall()
    )
    state = json.loads(first)
    rows = [Row(slot_of(row[2]), *row[1:]) for row in events]
    cursor = Cursor.of(*state["cursor"] or [None] * 4)
    last = state["last"]
    is_last = state["count"] < limit and len(rows) < PAGE_EVENTS
    if len(rows) == PAGE_EVENTS:
        last = rows[-1].position
    elif is_last:
        # Rows at the end may be pruned already. All later positions are above the cursor.
        last = max(after if last is None else last, cursor.position)
    channels = {row.channel for row in rows}
    unreliable = channels.difference(reliable(channels))
    return Page(
        rows=[row for row in rows if row.channel not in unreliable] if unreliable else rows,
        last=last,
        is_last=is_last,
        cursor=cursor,
        name=state["name"],
        epoch=state["epoch"] or 0,
        paused=bool(state["paused"]),
        lost=dict(state["lost"] or ()),
        asked=state["asked"],
    )


def read_data(connection: Connection, position: int) -> str | None:
    """The data of an event. None if it is pruned."""
    row = connection.execute(_DATA, [position]).fetchone()
    return row and row[0]


def make_event(
    channel: str,
    number: int,
    event_type: str,
    data: str,
    meta: str | None,
    position: int,
    created: datetime,
    committed_at: datetime | None,
    *,
    replayed: bool,
    attempt: int,
) -> ConsumedEvent:
    return ConsumedEvent(
        event_id(channel, number),
        channel,
        number % INCARNATION,
        event_type,
        data,
        None if meta is None else json.loads(meta),
        position,
        created,
        committed_at,
        replayed,
        attempt,
    )
