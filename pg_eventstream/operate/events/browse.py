"""Pages of events and of channels, for the admin, from tables of any size.

A page is a range of a key: it continues after the last key of the page before it. Nothing is
counted, and no row is read to be skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db import connections

from ...channels import is_reliable, reliable
from ...postgres.places import first_since
from ...postgres.sequence import CURSOR, Cursor
from ...sse import make_id

PAGE_EVENTS = 100
PAGE_CHANNELS = 100
#: A search by type looks at this many of the newest events.
SEARCHED = 10_000
#: Characters of the data that a list shows.
_SHOWN = 80
# Rows of the outbox that are looked at, the newest ones.
_OUTBOX = 1000
# A search for one event looks at this many of the newest events of its channel.
_PLACES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedEvent:
    """An event in a list. One that is not sequenced yet has no position, id and time of that."""

    pk: int
    channel: str
    type: str
    #: The beginning of the data, if ``is_cut``.
    data: str
    is_cut: bool
    created: datetime
    committed: datetime | None
    position: int | None = None
    id: str | None = None
    sequenced: datetime | None = None


@dataclass(frozen=True, slots=True)
class EventPage:
    """The newest events first. ``older`` is the key of the next page; None if there is none.

    ``waiting`` are events that are committed and not sequenced, on the first page.
    """

    events: list[ListedEvent]
    waiting: list[ListedEvent]
    older: int | None


def list_events(
    alias: str,
    *,
    channel: str | None = None,
    event_type: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    before: int | None = None,
) -> EventPage:
    """A page of the events that match.

    ``since`` (inclusive) and ``until`` (exclusive) are times at which events were sequenced. With
    an ``event_type`` only the newest `SEARCHED` events that match otherwise are searched. Raises
    ``django.db.Error``.
    """
    with _reading(alias) as read:
        conditions = ["true"]
        params: list[Any] = []
        key = "position"
        if channel is not None:
            key = "eid"
            conditions.append("channel = %s")
            params.append(channel)
        for moment, comparison in ((since, ">="), (until, "<")):
            if moment is not None:
                first = first_since(read.one, moment, channel)
                if first is not None:
                    conditions.append(f"{key} {comparison} %s")
                    params.append(first)
                elif comparison == ">=":
                    return EventPage([], [], None)
        # Where a type is searched, the next page continues in the same newest events.
        inner, outer = ([], [f"s.{key} < %s"]) if event_type else ([f"{key} < %s"], [])
        if before is None:
            inner, outer = [], []
        rows = read.all(
            f"""
            SELECT s.{key}, s.position, s.channel, s.eid + coalesce(s.incarnation, 0),
                   s.committed_at, s.sequenced_at, e.id, e.type, left(e.data, %s),
                   octet_length(e.data), e.created
              FROM (SELECT * FROM pg_eventstream_stream
                     WHERE {" AND ".join([*conditions, *inner])}
                     ORDER BY {"channel DESC, eid DESC" if channel is not None else "position DESC"}
                     LIMIT %s) AS s
             CROSS JOIN LATERAL (
                   SELECT * FROM pg_eventstream_event WHERE id = s.event_id LIMIT 1) AS e
             WHERE {" AND ".join(["%s::text IS NULL OR e.type = %s", *outer])}
             ORDER BY s.{key} DESC LIMIT %s
            """,  # noqa: S608
            [
                _SHOWN,
                *params,
                *([before] if inner else []),
                SEARCHED if event_type else PAGE_EVENTS + 1,
                event_type,
                event_type,
                *([before] if outer else []),
                PAGE_EVENTS + 1,
            ],
        )
        waiting = []
        if before is None and since is None and until is None:
            waiting = [
                event
                for event in _list_waiting(read)
                if (channel is None or event.channel == channel)
                and (event_type is None or event.type == event_type)
            ]
    with_ids = {*reliable({row[2] for row in rows})}
    events = [
        ListedEvent(
            pk=pk,
            channel=name,
            type=its_type,
            data=data,
            is_cut=size > len(data.encode()),
            created=created,
            committed=committed,
            position=position,
            id=make_id({name: number}) if name in with_ids else None,
            sequenced=sequenced,
        )
        for _, position, name, number, committed, sequenced, pk, its_type, data, size, created in (
            rows[:PAGE_EVENTS]
        )
    ]
    return EventPage(events, waiting, rows[PAGE_EVENTS - 1][0] if len(rows) > PAGE_EVENTS else None)


#: Whether an event of the outbox ``o`` is not sequenced yet, by the cursor ``c``: see
#: `models.Cursor`.
_IS_WAITING = """
    coalesce(NOT pg_visible_in_snapshot(o.xid, c.snapshot)
             AND (c.done IS NULL OR o.seq > c.done OR NOT pg_visible_in_snapshot(o.xid, c.until)
                  OR o.xid <> ALL(ARRAY(SELECT pg_snapshot_xip(c.snapshot)))), true)
"""
_WHOLE_CURSOR = """
    (SELECT snapshot, until, done FROM pg_eventstream_cursor ORDER BY position DESC LIMIT 1)
"""


def _list_waiting(read: _Reading) -> list[ListedEvent]:
    rows = read.all(
        f"""
        SELECT e.id, e.channel, e.type, left(e.data, %s), octet_length(e.data), e.created,
               o.committed_at
          FROM (SELECT * FROM pg_eventstream_outbox ORDER BY xid DESC, seq DESC LIMIT %s) AS o
          LEFT JOIN {_WHOLE_CURSOR} AS c ON true
         CROSS JOIN LATERAL (
               SELECT * FROM pg_eventstream_event WHERE id = o.event_id LIMIT 1) AS e
         WHERE {_IS_WAITING}
         ORDER BY o.xid DESC, o.seq DESC LIMIT %s
        """,  # noqa: S608
        [_SHOWN, _OUTBOX, PAGE_EVENTS],
    )
    return [
        ListedEvent(
            pk=pk,
            channel=channel,
            type=event_type,
            data=data,
            is_cut=size > len(data.encode()),
            created=created,
            committed=committed,
        )
        for pk, channel, event_type, data, size, created, committed in rows
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventDetail:
    """All that is known about an event."""

    pk: int
    channel: str
    type: str
    data: str
    meta: str | None
    skip_user_ids: list[str]
    created: datetime
    committed: datetime | None
    position: int | None
    id: str | None
    sequenced: datetime | None
    #: Whether it is committed and waits to be sequenced, as far as was looked.
    is_waiting: bool
    #: Whether each proxy that the publisher knows has acknowledged it.
    proxies: dict[str, bool] = field(default_factory=dict)


def get_event(alias: str, pk: int, position: int | None = None) -> EventDetail | None:
    """The event; None if there is none.

    No index leads from an event to its place, so ``position`` says where it is expected. Otherwise
    the newest 10,000 events of its channel are searched. Raises ``django.db.Error``.
    """
    with _reading(alias) as read:
        event = read.one(
            """
            SELECT channel, type, data, meta::text, skip_user_ids, created
              FROM pg_eventstream_event WHERE id = %s
            """,
            [pk],
        )
        if event is None:
            return None
        channel, event_type, data, meta, skip_user_ids, created = event
        columns = "position, eid + coalesce(incarnation, 0), committed_at, sequenced_at"
        place = position is not None and read.one(
            f"SELECT {columns} FROM pg_eventstream_stream"  # noqa: S608
            " WHERE position = %s AND event_id = %s",
            [position, pk],
        )
        place = place or read.one(
            f"""
            SELECT {columns}
              FROM (SELECT * FROM pg_eventstream_stream WHERE channel = %s
                     ORDER BY channel DESC, eid DESC LIMIT %s) AS newest
             WHERE event_id = %s
            """,  # noqa: S608
            [channel, _PLACES, pk],
        )
        waiting = None
        proxies: dict[str, bool] = {}
        if place is None:
            waiting = read.one(
                f"""
                SELECT committed_at
                  FROM (SELECT * FROM pg_eventstream_outbox
                         ORDER BY xid DESC, seq DESC LIMIT %s) AS o
                  LEFT JOIN {_WHOLE_CURSOR} AS c ON true
                 WHERE event_id = %s AND {_IS_WAITING}
                """,  # noqa: S608
                [_OUTBOX, pk],
            )
        else:
            rows = read.all(
                f"SELECT c.*, name, p.position, p.incarnation"  # noqa: S608
                f" FROM pg_eventstream_proxy AS p LEFT JOIN {CURSOR} AS c ON true ORDER BY name",
                [],
            )
            proxies = {
                row[4]: place[0] <= Cursor.of(*row[:4]).valid(row[5], row[6]) for row in rows
            }
    return EventDetail(
        pk=pk,
        channel=channel,
        type=event_type,
        data=data,
        meta=meta,
        skip_user_ids=skip_user_ids,
        created=created,
        committed=(place[2] if place else waiting[0] if waiting else None),
        position=place[0] if place else None,
        id=make_id({channel: place[1]}) if place and is_reliable(channel) else None,
        sequenced=place[3] if place else None,
        is_waiting=waiting is not None,
        proxies=proxies,
    )


@dataclass(frozen=True, slots=True)
class ListedChannel:
    """A channel. Without a time, all its events are pruned."""

    name: str
    last_id: str | None
    sequenced: datetime | None


@dataclass(frozen=True, slots=True)
class ChannelPage:
    """Channels by name. ``following`` is the first name of the next page; None if there is none."""

    channels: list[ListedChannel]
    following: str | None


def list_channels(alias: str, first: str = "") -> ChannelPage:
    """A page of the channels whose names are not before ``first``. Raises ``django.db.Error``.

    The index leads from one channel to the next, however many events are in between.
    """
    with _reading(alias) as read:
        rows = read.all(
            """
            WITH RECURSIVE next (channel) AS (
                (SELECT channel FROM pg_eventstream_stream
                  WHERE channel >= %(first)s ORDER BY channel, eid LIMIT 1)
                UNION ALL
                SELECT following.channel FROM next CROSS JOIN LATERAL (
                       SELECT s.channel FROM pg_eventstream_stream AS s
                        WHERE s.channel > next.channel ORDER BY s.channel, s.eid LIMIT 1
                       ) AS following
            ), named (channel) AS MATERIALIZED (
                (SELECT channel FROM next LIMIT %(most)s)
                UNION
                (SELECT name FROM pg_eventstream_channel
                  WHERE name >= %(first)s ORDER BY name LIMIT %(most)s)
                ORDER BY channel LIMIT %(most)s
            )
            SELECT named.channel, coalesce(last.number, known.pruned + known.incarnation),
                   last.sequenced_at
              FROM named
              LEFT JOIN LATERAL (
                   SELECT s.eid + coalesce(s.incarnation, 0) AS number, s.sequenced_at
                     FROM pg_eventstream_stream AS s WHERE s.channel = named.channel
                    ORDER BY s.channel DESC, s.eid DESC LIMIT 1) AS last ON true
              LEFT JOIN LATERAL (
                   SELECT pruned, incarnation FROM pg_eventstream_channel
                    WHERE name = named.channel LIMIT 1) AS known ON true
             ORDER BY named.channel
            """,
            {"first": first, "most": PAGE_CHANNELS + 1},
        )
    channels = [
        ListedChannel(name, make_id({name: number}) if is_reliable(name) else None, sequenced)
        for name, number, sequenced in rows[:PAGE_CHANNELS]
    ]
    return ChannelPage(channels, rows[PAGE_CHANNELS][0] if len(rows) > PAGE_CHANNELS else None)


class _Reading:
    """Queries over one cursor of Django's connection."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def all(self, query: str, params: Any) -> list[tuple[Any, ...]]:
        self._cursor.execute(query, params)
        return list(self._cursor.fetchall())

    def one(self, query: str, params: Any) -> tuple[Any, ...] | None:
        self._cursor.execute(query, params)
        row: tuple[Any, ...] | None = self._cursor.fetchone()
        return row


@contextmanager
def _reading(alias: str) -> Iterator[_Reading]:
    with connections[alias].cursor() as cursor:
        yield _Reading(cursor)
