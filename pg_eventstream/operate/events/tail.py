"""Follows the stream for a person, with the delay of each event at each station.

It only reads. Every event of the stream after the place where it begins is yielded once and in
order, also after the connection to the database was lost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import psycopg

from ... import sse
from ...backoff import Backoff
from ...channels import reliable
from ...conf import conf, proxy_name
from ...errors import InvalidRequest
from ...liveness import LATE_SECONDS
from ...postgres.connector import Connector, explain, fetch_one
from ...postgres.listener import NEWS, Listener
from ...postgres.places import FetchRow, first_since, parse_age
from ...postgres.sequence import ANOTHER_STREAM, CURSOR, UNKNOWN, Cursor
from ...postgres.threads import return_connections
from ..queries import HUB_SESSION, LEADERS

_PAGE_EVENTS = 500
_PAGE_BYTES = 4_000_000
#: It reads no further while it holds this many events.
_MOST_HELD = 2000
#: An event is held so long for its acknowledgement, which feeds write every 0.5 seconds.
_HOLD = timedelta(seconds=1)
# The seconds between two looks at the proxies, while events are held.
_LOOK_SECONDS = 0.05
# The seconds between two looks at the database while no notification arrives.
_POLL_SECONDS = 5.0
_PAUSE_SECONDS = 1.0

#: Begins with the oldest event that is stored.
EARLIEST: Final = "earliest"
#: Where to begin: `EARLIEST`, the time before now, the last number seen of each channel, or None
#: for now.
Since = str | timedelta | Mapping[str, int] | None


def parse_since(text: str | None, channels: list[str]) -> Since:
    """Where to begin: ``earliest``, an age such as ``10m``, or an id as clients see it.

    An id can contain a digest instead of a long name, which stands for one of the ``channels``.

    Raises `InvalidRequest` for anything else.
    """
    if text is None or text == EARLIEST:
        return text
    if (age := parse_age(text)) is not None:
        return age
    try:
        return sse.parse_id(text, channels)
    except InvalidRequest as e:
        raise InvalidRequest(
            f"{text!r} is neither an age (30s, 10m, 2h, 1d) nor an event's id (CHANNEL:NUMBER) nor"
            " earliest."
        ) from e


@dataclass(slots=True, kw_only=True)
class TailedEvent:
    """An event of the stream. All times are those of the database server."""

    position: int
    #: As clients see it, for one channel. None in an unreliable channel, which has no ids.
    id: str | None
    channel: str
    type: str
    #: As it was sent, shortened if `Tail` was told to.
    data: str
    skip_user_ids: list[str]
    meta: Any
    created: datetime
    #: When the trigger ran, at COMMIT. None if an older trigger did not record it.
    committed: datetime | None
    sequenced: datetime
    #: Whether all proxies of this process's settings have acknowledged it; None without proxies.
    published: bool | None = None
    #: The time between the commit and an acknowledgement that covers it: a maximum, because
    #: proxies' positions are stored every 0.5 seconds. None if nobody looked at that time.
    published_within: timedelta | None = None

    @property
    def begun(self) -> datetime:
        """The commit, or else the beginning of the transaction: delays count from here."""
        return self.committed or self.created

    @property
    def sequenced_after(self) -> timedelta:
        return max(self.sequenced - self.begun, timedelta(0))


class Tail:
    """Follows the channels, or all with None. `follow` does the work.

    At most ``most`` characters of the data are read; None reads them whole. ``say`` is called with
    messages for a person: a lost connection, another stream, nobody who puts events in order.
    """

    def __init__(
        self,
        connector: Connector,
        channels: list[str] | None,
        since: Since,
        *,
        most: int | None,
        say: Callable[[str], object],
    ) -> None:
        self._connector = connector
        self._channels = channels
        self._since = since
        self._most = most
        self._say = say
        self._proxies = [proxy_name(config) for config in conf.grip_proxies]
        self._position: int | None = None
        # For each channel of the id to begin with, the last eid that was seen.
        self._seen: dict[str, int] = {}
        self._cursor = UNKNOWN
        self._held: deque[TailedEvent] = deque()
        self._has_more = True
        self._said_nobody = False

    def follow(self) -> Iterator[list[TailedEvent]]:
        """Yield the next events as soon as there are any, without end.

        It also yields an empty list every second, so that the caller can look whether to end.

        Raises `psycopg.Error` if the first connection fails, or for an error that connecting again
        does not cure.
        """
        backoff = Backoff(*self._connector.limits.reconnect)
        while True:
            try:
                with self._connector.connect("tail") as connection:
                    listener = Listener(connection, NEWS)
                    try:
                        self._begin_or_continue(connection)
                        backoff.reset()
                        yield from self._follow(connection, listener)
                    finally:
                        listener.close()
            except psycopg.OperationalError as e:
                if self._position is None:
                    raise
                self._say(f"database: {' '.join(explain(e).split())}; connecting again")
            if self._held:
                yield self._take(len(self._held))
            time.sleep(backoff.next())

    def _begin_or_continue(self, connection: psycopg.Connection[Any]) -> None:
        if self._position is None:
            self._position = self._begin(connection)
        else:
            self._say("connected again")

    def _follow(
        self, connection: psycopg.Connection[Any], listener: Listener
    ) -> Iterator[list[TailedEvent]]:
        self._has_more = True  # possibly, since notifications from before are lost
        read_at = time.monotonic()
        while True:
            if self._has_more and len(self._held) < _MOST_HELD:
                self._read_page(connection)
                read_at = time.monotonic()
            if self._held and (ready := self._take(self._count_ready(connection))):
                yield ready
            if self._has_more and len(self._held) < _MOST_HELD:
                continue
            if not self._held:
                self._look_who_sequences(connection)
            yield []
            if listener.wait(_LOOK_SECONDS if self._held else _PAUSE_SECONDS) or (
                time.monotonic() >= read_at + _POLL_SECONDS
            ):
                self._has_more = True

    # Where to begin

    def _begin(self, connection: psycopg.Connection[Any]) -> int:
        row = fetch_one(
            connection,
            f"""
            SELECT coalesce((SELECT max(position) FROM pg_eventstream_stream
                              WHERE position > coalesce(c.position, 0)), c.position, 0),
                   statement_timestamp(), c.*
              FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true
            """,  # noqa: S608
        )
        end, now = int(row[0]), row[1]
        self._cursor = Cursor.of(*row[2:])

        def fetch(query: str, params: list[Any]) -> tuple[Any, ...] | None:
            return connection.execute(query, params).fetchone()

        match self._since:
            case None:
                return end
            case timedelta() as age:
                first = first_since(fetch, now - age)
            case str():
                found = fetch("SELECT min(position) FROM pg_eventstream_stream", [])
                first = found[0] if found else None
            case numbers:
                places = [self._after(fetch, *item) for item in numbers.items()]
                return min((place for place in places if place is not None), default=end)
        return end if first is None else int(first) - 1

    def _after(self, fetch: FetchRow, channel: str, number: int) -> int | None:
        """The position after which the channel's events after an id are; None for the end."""
        eid = number % sse.INCARNATION
        self._seen[channel] = eid
        found = fetch(
            """
            SELECT position, eid, eid + coalesce(incarnation, 0) FROM pg_eventstream_stream
             WHERE channel = %s AND eid >= %s ORDER BY channel, eid LIMIT 1
            """,
            [channel, eid],
        )
        if found is not None and found[1] == eid:
            if found[2] == number:
                return int(found[0])
            # An id of a stream that was lost has the number of another event here.
            del self._seen[channel]
        if eid:
            self._say(
                f"The event {sse.make_id({channel: number})} is not stored: it was pruned, or was"
                " never sent. Its channel begins with the next event that is stored."
            )
        return None if found is None else int(found[0]) - 1

    # Reading

    def _read_page(self, connection: psycopg.Connection[Any]) -> None:
        # Reads the places of all channels, so that the position covers them, and the content of
        # the events of those that are followed. A page ends early if the content is large.
        rows = connection.execute(
            f"""
            SELECT c.*, page.position, channel, eid, number, sequenced_at, committed_at, type, data,
                   skip_user_ids, meta, created
              FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true LEFT JOIN (
              SELECT * FROM (
                SELECT place.*, event.*, row_number() OVER by_position AS nth,
                       sum(octet_length(event.data)) OVER by_position AS bytes
                  FROM (
                    SELECT position, channel, eid, eid + coalesce(incarnation, 0) AS number,
                           event_id, sequenced_at, committed_at
                      FROM pg_eventstream_stream
                     WHERE position > %(position)s ORDER BY position LIMIT %(page)s
                  ) AS place
                  LEFT JOIN LATERAL (
                    SELECT type, skip_user_ids, meta, created,
                           CASE WHEN %(most)s::int IS NULL THEN data ELSE left(data, %(most)s) END
                           AS data
                      FROM pg_eventstream_event
                     WHERE id = place.event_id
                       AND (%(channels)s::text[] IS NULL OR place.channel = ANY(%(channels)s))
                    OFFSET 0
                  ) AS event ON true
                WINDOW by_position AS (ORDER BY position)
              ) AS measured
             WHERE nth = 1 OR coalesce(bytes, 0) <= %(bytes)s) AS page ON true
             ORDER BY page.position
            """,  # noqa: S608
            {
                "position": self._position,
                "page": _PAGE_EVENTS,
                "most": self._most,
                "channels": self._channels,
                "bytes": _PAGE_BYTES,
            },
        ).fetchall()
        if not self._still_known(Cursor.of(*rows[0][:4])):
            return
        rows = [row[4:] for row in rows if row[4] is not None]
        self._has_more = bool(rows)
        with_ids = {*reliable({row[1] for row in rows})}
        return_connections()  # a connection that the channel manager may have used
        for position, channel, eid, number, sequenced, committed, event_type, *rest in rows:
            if event_type is None or eid <= self._seen.get(channel, eid - 1):
                continue
            event_id = sse.make_id({channel: number}) if channel in with_ids else None
            data, skip_user_ids, meta, created = rest
            self._held.append(
                TailedEvent(
                    position=position,
                    id=event_id,
                    channel=channel,
                    type=event_type,
                    data=data,
                    skip_user_ids=skip_user_ids,
                    meta=meta,
                    created=created,
                    committed=committed,
                    sequenced=sequenced,
                )
            )
        if rows:
            self._position = rows[-1][0]

    def _still_known(self, cursor: Cursor) -> bool:
        """Whether the position is still valid. Otherwise go back to where it is."""
        known, self._cursor = self._cursor, cursor
        if cursor.follows(known):
            return True
        assert self._position is not None  # noqa: S101
        if known.place:
            self._say(f"{ANOTHER_STREAM}; continuing with the new one")
            self._seen.clear()
        self._position = cursor.valid(self._position, known.incarnation)
        return False

    # Holding

    def _count_ready(self, connection: psycopg.Connection[Any]) -> int:
        """The number of held events that are published, or that have been held long enough."""
        if not self._proxies:
            return len(self._held)
        rows = connection.execute(
            """
            SELECT clock_timestamp(), name, position, incarnation
              FROM (SELECT) AS always LEFT JOIN pg_eventstream_proxy ON name = ANY(%s)
            """,
            [self._proxies],
        ).fetchall()
        now = rows[0][0]
        positions = [self._cursor.valid(*row[2:]) for row in rows if row[1] is not None]
        acknowledged = min(positions) if len(positions) == len(self._proxies) else -1
        for ready, event in enumerate(self._held):
            is_young = now - event.sequenced < _HOLD
            event.published = event.position <= acknowledged
            if event.published:
                # Of an older event only its age is known.
                event.published_within = now - event.begun if is_young else None
            elif is_young:
                return ready
        return len(self._held)

    def _take(self, count: int) -> list[TailedEvent]:
        return [self._held.popleft() for _ in range(count)]

    def _look_who_sequences(self, connection: psycopg.Connection[Any]) -> None:
        """Say once that no process puts events in order, if that is so."""
        if self._said_nobody:
            return
        # Through a pooler, a publisher has no lock for long, and only its heartbeat shows.
        (is_sequenced,) = fetch_one(
            connection,
            f"""
            SELECT EXISTS ({LEADERS})
                OR EXISTS (
                   SELECT FROM pg_stat_activity
                    WHERE datname = current_database() AND application_name = %s)
                OR EXISTS (
                   SELECT FROM pg_eventstream_publisher
                    WHERE heartbeat > statement_timestamp() - make_interval(secs => %s))
            """,  # noqa: S608
            [HUB_SESSION, LATE_SECONDS],
        )
        if not is_sequenced:
            self._said_nobody = True
            self._say(
                "No publisher leads and no process of the application streams, so new events are"
                " not put in order, and none appears here. Start a publisher:"
                " python manage.py eventstream_publisher"
            )
