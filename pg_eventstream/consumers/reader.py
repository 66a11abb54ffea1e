"""Reads a page of the stream, once for all slots of a process."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import psycopg

from ..channels import reliable
from ..postgres.sequence import CURSOR, Cursor
from ..postgres.slots import SLOTS, follows_sql, slot_of, slot_sql
from ..sse import INCARNATION
from .checkpoints import preparable
from .declare import Consumer
from .event import ConsumedEvent, event_id

Connection = psycopg.Connection[Any]

#: The events of a page, at most.
PAGE_EVENTS = 500
# Larger data are read when the event is handled.
_DATA_BYTES = 64_000

# One statement, so that events that are missing and what the pruner wrote about them are seen
# together. The first row has what is stored about the consumer, and the present time. The others
# are events, which are looked up one by one (OFFSET 0), so that no statistics lead to reading all.
_PAGE = f"""
    WITH page AS MATERIALIZED (
        SELECT * FROM pg_eventstream_stream
         WHERE position > %(after)s ORDER BY position LIMIT %(limit)s
    )
    SELECT c.*, k.*, page.*, NULL AS at, NULL, NULL, NULL, NULL, NULL,
           date_part('epoch', statement_timestamp()), NULL
      FROM (SELECT) AS always
      LEFT JOIN {CURSOR} AS c ON true
      LEFT JOIN (
           SELECT name, epoch, paused,
                  ARRAY(SELECT ARRAY[slot, lost] FROM pg_eventstream_slot
                         WHERE consumer_id = %(id)s AND lost IS NOT NULL) AS lost
             FROM pg_eventstream_consumer WHERE id = %(id)s
           ) AS k ON true
      LEFT JOIN (SELECT max(position), count(*) FROM page) AS page (last, count) ON true
     UNION ALL
    (SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
            s.position, s.channel, s.eid + coalesce(s.incarnation, 0), e.type,
            CASE WHEN octet_length(e.data) <= {_DATA_BYTES} THEN e.data END, e.meta::text,
            date_part('epoch', e.created), date_part('epoch', s.committed_at)
       FROM page AS s
      CROSS JOIN LATERAL (SELECT * FROM pg_eventstream_event WHERE id = s.event_id OFFSET 0) AS e
      WHERE {follows_sql("s.channel", "%(channels)s::text[]", "%(prefixes)s::text[]")}
        AND (%(slots)s::int[] IS NULL OR {slot_sql("s.channel")} = ANY(%(slots)s::int[]))
      ORDER BY s.position LIMIT {PAGE_EVENTS})
     ORDER BY at NULLS FIRST
"""  # noqa: S608

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
    consumer: Consumer,
    consumer_id: int,
    after: int,
    slots: Collection[int],
) -> Page:
    """Read the events after a position that belong to the slots."""
    limit = positions_of_page(len(slots))
    state, *events = (
        preparable(connection)
        .execute(
            _PAGE,
            {
                "id": consumer_id,
                "after": after,
                "limit": limit,
                "channels": list(consumer.channels),
                "prefixes": list(consumer.prefixes),
                "slots": None if len(slots) == SLOTS else list(slots),
            },
            binary=True,
        )
        .fetchall()
    )
    name, epoch, paused, lost, last, count = state[4:10]
    rows = [Row(slot_of(row[11]), *row[10:]) for row in events]
    cursor = Cursor.of(*state[:4])
    is_last = count < limit and len(rows) < PAGE_EVENTS
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
        name=name,
        epoch=epoch or 0,
        paused=bool(paused),
        lost=dict(lost or ()),
        asked=state[16],
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
