"""Reads the stream once for all subscribers of a process. There is one hub per database.

A thread reads the stream over one connection when notified, and passes each page to the event loops
that have subscribers; a loop passes it on to its subscribers. The thread runs as long as there are
any. If no publisher leads, the hub also sequences events, so that development needs no other
process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import psycopg

from .. import instruments
from ..backoff import Backoff
from ..channels import PERMISSION_CHANGES, reliable
from ..conf import conf
from ..postgres.connector import Connector, explain, fetch_one
from ..postgres.listener import BELL, NEWS, Listener
from ..postgres.sequence import (
    ANOTHER_STREAM,
    CURSOR,
    HAS_NO_LEADER,
    SEQUENCE_UNLESS_LED,
    UNKNOWN,
    Cursor,
)
from ..postgres.threads import return_connections
from ..rarely import Rarely
from ..stream_event import PermissionChange, Row, decode

logger = logging.getLogger(__name__)

_PAGE_EVENTS = 200
#: A larger event is not passed on; each subscriber reads it from the database.
_EVENT_BYTES = 64_000
#: An event of any channel is read with its page if its data and users to skip are no larger.
_SMALL_BYTES = 1000
# The number of pages that a loop may have pending; then the hub waits for it.
_PAGES_AHEAD = 4
_RETRY_SECONDS = (0.1, 5.0)
_look_is_due, _rarely = Rarely(30), Rarely()


class Subscriber(Protocol):
    """Gets the rows of its channels, and permission changes of its reader for these channels.

    Its methods are only called in its event loop.
    """

    @property
    def channels(self) -> tuple[str, ...]: ...
    def offer(self, row: Row) -> None:
        """Take the row, or remember to read it from the database."""

    def read_again(self) -> None:
        """Read from the database, because rows could be missing."""


class _Group:
    """The subscribers of one event loop. All methods but `post` are called in that loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        #: The subscribers with their readers.
        self.subscribers: dict[Subscriber, str | None] = {}
        #: The subscribers by channel, and by reader and channel.
        self._concerned: defaultdict[str | tuple[str, str], set[Subscriber]] = defaultdict(set)
        self._room = threading.Semaphore(_PAGES_AHEAD)

    def add(self, subscriber: Subscriber, reader: str | None) -> None:
        self.subscribers[subscriber] = reader
        for concern in _concerns(subscriber, reader):
            self._concerned[concern].add(subscriber)

    def discard(self, subscriber: Subscriber) -> None:
        for concern in _concerns(subscriber, self.subscribers.pop(subscriber)):
            self._concerned[concern].discard(subscriber)
            if not self._concerned[concern]:
                del self._concerned[concern]

    def post(self, page: list[Row], stopping: threading.Event) -> None:
        """Pass a page to the loop. Waits for a busy loop, so that memory stays bounded."""
        while not self._room.acquire(timeout=1):
            if stopping.is_set() or self.loop.is_closed():
                return
        self.call(self._deliver, page)

    def call(self, function: Any, *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop and all its streams are closed
            self.loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, page: list[Row]) -> None:
        self._room.release()
        for row in page:
            for subscriber in self._concerned.get(_concern(row), ()):
                subscriber.offer(row)

    def read_again(self, subscribers: list[Subscriber]) -> None:
        for subscriber in subscribers:
            if subscriber in self.subscribers:
                subscriber.read_again()


def _concern(row: Row) -> str | tuple[str, str]:
    if isinstance(row, PermissionChange):
        return row.user, row.channel
    return row.channel


def _concerns(subscriber: Subscriber, reader: str | None) -> Iterator[str | tuple[str, str]]:
    for channel in subscriber.channels:
        yield channel
        if reader is not None:
            yield reader, channel


class Hub:
    """Offers all rows of the stream to its subscribers, in order and without a gap.

    The cost of an event depends only on the subscribers that it concerns, and the cost of adding or
    removing a subscriber only on its channels.
    """

    def __init__(self, alias: str) -> None:
        self._connector = Connector(alias)
        self._lock = threading.Lock()  # guards all attributes below
        self._groups: dict[asyncio.AbstractEventLoop, _Group] = {}
        #: The number of subscribers of each channel, in all loops.
        self._followed: Counter[str] = Counter()
        self._reader: _Reader | None = None

    def add(self, subscriber: Subscriber, reader: str | None = None) -> None:
        """Offer rows to the subscriber from now on. After this, it reads the existing ones itself.

        ``reader`` is the user id whose permission changes it is offered.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            self._forget_closed_loops()
            self._groups.setdefault(loop, _Group(loop)).add(subscriber, reader)
            self._followed.update(subscriber.channels)
            if self._reader is None:
                self._reader = _Reader(self)
                self._reader.start()

    def discard(self, subscriber: Subscriber) -> None:
        loop = asyncio.get_running_loop()
        with self._lock:
            group = self._groups.get(loop)
            if group is not None and subscriber in group.subscribers:
                group.discard(subscriber)
                self._unfollow(subscriber)
                if not group.subscribers:
                    del self._groups[loop]
            self._stop_unless_needed()

    @property
    def has_begun(self) -> bool:
        """Whether all new rows are offered. When that begins, `Subscriber.read_again` is called."""
        reader = self._reader
        return reader is not None and reader.position is not None

    def audience(self, reader: _Reader) -> list[_Group]:
        """The groups that the reader serves; none if it is no longer needed."""
        with self._lock:
            self._forget_closed_loops()
            self._stop_unless_needed()
            return list(self._groups.values()) if reader is self._reader else []

    def read_again(self, reader: _Reader) -> None:
        """Make all current subscribers read again. Later ones read when they are added."""
        for group in self.audience(reader):
            with self._lock:
                subscribers = list(group.subscribers)
            group.call(group.read_again, subscribers)

    def followed(self, channels: Iterable[str]) -> set[str]:
        """Those of the channels that have subscribers."""
        with self._lock:
            return {channel for channel in channels if channel in self._followed}

    def _unfollow(self, subscriber: Subscriber) -> None:
        # Not by subtracting one Counter from another, which reads all their entries.
        for channel in subscriber.channels:
            self._followed[channel] -= 1
            if not self._followed[channel]:
                del self._followed[channel]

    def _forget_closed_loops(self) -> None:
        for loop, group in list(self._groups.items()):
            if loop.is_closed():
                for subscriber in group.subscribers:
                    self._unfollow(subscriber)
                del self._groups[loop]

    def _stop_unless_needed(self) -> None:
        if not self._groups and self._reader is not None:
            self._reader.stop()
            self._reader = None


class _Reader(threading.Thread):
    """The hub's thread."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(name="pg_eventstream hub", daemon=True)
        self._hub = hub
        self._stopping = threading.Event()
        self._listener: Listener | None = None
        self.position: int | None = None
        self._cursor = UNKNOWN
        self._may_sequence = True

    def stop(self) -> None:
        self._stopping.set()
        listener = self._listener
        if listener is not None:
            listener.wake()

    def run(self) -> None:
        backoff = Backoff(*_RETRY_SECONDS)
        while not self._stopping.is_set():
            try:
                with self._hub._connector.connect("hub") as connection:
                    self._follow(connection)
            except psycopg.Error as e:
                logger.warning(
                    "hub: database: %s; connecting again",
                    explain(e),
                    extra={"event": "database-lost", "part": "hub"},
                )
                if self.position is not None:  # it worked before
                    backoff.at_most(1.0)
            except Exception:
                logger.exception(
                    "hub: unexpected error; connecting again",
                    extra={"event": "unexpected-error", "part": "hub"},
                )
            else:
                break
            self._stopping.wait(backoff.next())

    def _follow(self, connection: psycopg.Connection[Any]) -> None:
        self._listener = listener = Listener(connection, NEWS, BELL)
        try:
            # Notifications from before it listened can be lost.
            rung = {BELL}
            while not self._stopping.is_set():
                if BELL in rung:
                    self._sequence(connection)
                if self.position is None:
                    self._begin(connection)
                while not self._stopping.is_set() and self._read_page(connection):
                    pass
                # The safety poll, in case a notification was lost.
                rung = listener.wait(conf.safety_poll) or {BELL}
        finally:
            self._listener = None
            listener.close()

    def _begin(self, connection: psycopg.Connection[Any]) -> None:
        # Reads only above the cursor, because pruned rows below might not be vacuumed.
        row = fetch_one(
            connection,
            f"""
            SELECT coalesce((SELECT max(position) FROM pg_eventstream_stream
                              WHERE position > coalesce(c.position, 0)), c.position, 0), c.*
              FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true
            """,  # noqa: S608
        )
        self.position = int(row[0])
        self._cursor = Cursor.of(*row[1:])
        # For subscribers that waited for this, or that knew another stream.
        self._hub.read_again(self)

    def _sequence(self, connection: psycopg.Connection[Any]) -> None:
        """Sequence events, as the publisher does, if none leads."""
        if self._may_sequence:
            try:
                row = connection.execute(SEQUENCE_UNLESS_LED, [self._cursor.as_known]).fetchone()
                if row and row[1]:
                    instruments.sequenced_events.inc(row[1])
            except psycopg.errors.InsufficientPrivilege:
                self._may_sequence = False
                logger.info(
                    "hub: this role may not sequence events, so the publisher must",
                    extra={"event": "may-not-sequence"},
                )
        elif _look_is_due():
            row = connection.execute(f"SELECT {HAS_NO_LEADER}").fetchone()
            if row and row[0] and _rarely():
                logger.warning(
                    "hub: no publisher leads, and this role may not sequence events, so none is"
                    " delivered. Start a publisher, and keep it running as a service:"
                    " python manage.py eventstream_publisher",
                    extra={"event": "no-publisher"},
                )

    def _read_page(self, connection: psycopg.Connection[Any]) -> int:
        # Reads the rows of all channels, so that the position covers them. The followed channels
        # are selected here and are not sent with the query, because there can be many thousands of
        # them. So small events are read with all rows, and large ones of followed channels after
        # that. New subscribers read the events of their channels themselves.
        rows = connection.execute(
            f"""
            SELECT c.*, news.position, news.channel, news.eid + coalesce(news.incarnation, 0),
                   news.prev, news.event_id, event.type, event.data, event.skip_user_ids
              FROM (SELECT) AS always
              LEFT JOIN {CURSOR} AS c ON true
              LEFT JOIN (SELECT * FROM pg_eventstream_stream
                          WHERE position > %s ORDER BY position LIMIT %s) AS news ON true
              LEFT JOIN LATERAL (
                   SELECT * FROM pg_eventstream_event
                    WHERE id = news.event_id
                      AND octet_length(data) + pg_column_size(skip_user_ids) <= %s OFFSET 0
                   ) AS event ON true
             ORDER BY news.position
            """,  # noqa: S608
            [self.position, _PAGE_EVENTS, _SMALL_BYTES],
        ).fetchall()
        cursor = Cursor.of(*rows[0][:4])
        if not cursor.follows(self._cursor):
            if self._cursor.place:
                logger.warning(
                    "hub: %s; clients are told what they lost",
                    ANOTHER_STREAM,
                    extra={"event": "stream-changed", "part": "hub"},
                )
            self._begin(connection)
            return 0
        self._cursor = cursor
        if rows[0][4] is None:
            return 0
        instruments.hub_pages.inc()
        followed = self._hub.followed({row[5] for row in rows}) | {PERMISSION_CHANGES}
        wanted = [_Row(*row[4:]) for row in rows if row[5] in followed]
        large = _read_large(connection, [row.event_id for row in wanted if row.type is None])
        if page := _decode(wanted, large):
            for group in self._hub.audience(self):
                group.post(page, self._stopping)
        return_connections()  # a connection that the channel manager may have used
        self.position = rows[-1][4]
        return len(rows)


class _Row(NamedTuple):
    """A row of the stream, with the content of its event if it is small."""

    position: int
    channel: str
    number: int
    prev: int | None
    event_id: int
    type: str | None
    data: str | None
    skip_user_ids: list[str] | None


_Content = tuple[str, str | None, list[str]]


def _read_large(connection: psycopg.Connection[Any], ids: list[int]) -> dict[int, _Content]:
    """The type, data and users to skip of events that were not pruned in the meantime."""
    if not ids:
        return {}
    rows = connection.execute(
        """
        SELECT event.id, event.type,
               CASE WHEN octet_length(event.data) <= %s THEN event.data END, event.skip_user_ids
          FROM unnest(%s::bigint[]) AS wanted (id)
         CROSS JOIN LATERAL (
               SELECT * FROM pg_eventstream_event WHERE id = wanted.id OFFSET 0) AS event
        """,
        [_EVENT_BYTES, ids],
    ).fetchall()
    return {row[0]: row[1:] for row in rows}


def _decode(rows: list[_Row], large: dict[int, _Content]) -> list[Row]:
    with_ids = {*reliable({row.channel for row in rows})}
    page = []
    for position, channel, number, prev, event_id, event_type, data, skip_user_ids in rows:
        if event_type is None:
            event_type, data, skip_user_ids = large.get(event_id, ("", None, []))
        page.append(
            decode(
                *(position, channel, number, prev, event_type, data),
                *(skip_user_ids or [], channel in with_ids),
            )
        )
    return page


_hubs: dict[str, Hub] = {}
_hubs_lock = threading.Lock()


def hub_of(alias: str) -> Hub:
    """The process's hub for a database alias."""
    with _hubs_lock:
        return _hubs.setdefault(alias, Hub(alias))


def _forget_parent() -> None:
    """Forget the hubs in a process that was forked, which has no threads and event loops."""
    global _hubs_lock
    _hubs_lock = threading.Lock()  # another thread could have held the old one
    _hubs.clear()


os.register_at_fork(after_in_child=_forget_parent)
