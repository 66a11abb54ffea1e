"""The world of the model test: a database, two proxies that fail on demand, and clients."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

from django.contrib.auth.models import User
from django.db import connections

from pg_eventstream.conf import conf
from pg_eventstream.grip import proxy as control_endpoint
from pg_eventstream.limits import Limits
from pg_eventstream.postgres.locks import LEADER_LOCK, LOCK_SPACE
from pg_eventstream.publisher.feed import Feed
from pg_eventstream.publisher.pruner import Pruner
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.environment import KEY
from tests.support.grip_proxy import Proxy, Session
from tests.support.http_service import body_of
from tests.support.origin import Origin, log_in
from tests.support.roles import granted

CHANNELS = ["public", "public b, c", "room", "volatile"]
SENDERS = ["sender0", "sender1", "sender2"]
STREAM, CONSUMERS = (
    tuple(f"pg_eventstream_{name}" for name in names.split())
    for names in (
        "event outbox stream channel cursor publisher proxy",
        "consumer checkpoint slot parked",
    )
)
#: What consumers have handled.
HANDLED = """
    CREATE TABLE handled_in_model (
        nth bigint GENERATED ALWAYS AS IDENTITY, consumer text, position bigint, channel text,
        eid bigint, data text, replayed boolean)
"""
#: The proxies refuse events with this text.
POISON = "poison"


class Killed(Exception):
    """The publisher was killed, as by kill -9."""


class FailingPort(ControlPort):
    """A control port that also breaks connections, before or after it took the items."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = POISON
        self.faults: deque[str] = deque()
        self.fault = ""

    @property
    def config(self) -> dict[str, str]:
        return {"control_uri": self.url, "key": KEY}

    def post(self, post: Callable[[], None]) -> None:
        """One request of the publisher, or its failure."""
        self.fault = self.faults.popleft() if self.faults else ""
        if self.fault == "killed before":
            raise Killed
        post()
        if self.fault == "killed after":
            raise Killed

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if self.fault == "503":
            self.answers = [503]
        if not self.fault.startswith("reset"):
            super().answer(request)
            return
        body = body_of(request)
        if self.fault == "reset after" and self.refused.encode() not in body:
            self.items += json.loads(body)["items"]


class World:
    """The state that all runs share; `begin_anew` empties the tables in between."""

    tables = (*STREAM, *CONSUMERS, "app_membership", "handled_in_model")

    def __init__(self, database: Database) -> None:
        # Committed events are visible to others; whether they are on a disk does not matter here.
        database.execute(f"ALTER DATABASE {database.name} SET synchronous_commit = off")
        database.execute(HANDLED)
        database.execute("CREATE SCHEMA saved")
        for table in self.tables:
            database.execute(f"CREATE TABLE saved.{table} AS TABLE {table}")
        self.origin = Origin()
        self._stack = ExitStack()
        self.ports = {
            port.url: port for port in (self._stack.enter_context(FailingPort()) for _ in "12")
        }
        for alias in SENDERS:
            connections.settings[alias] = dict(connections.settings["default"])
        self.connection, self.sequencer, sweeper = (
            self._stack.enter_context(database.connect()) for _ in range(3)
        )
        self.sequencer.execute(f"SET ROLE {granted(database, 'sequencer')}")
        self.sweeper = sweeper
        self.users: dict[str, User | None] = {"anonymous": None}
        self.cookies = {"anonymous": ""}
        for name in ("ann", "bob"):
            self.users[name], self.cookies[name] = log_in(name)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_transactions()
        for alias in SENDERS:
            del connections.settings[alias]
            delattr(connections._connections, alias)  # type: ignore[attr-defined]
        self._stack.close()

    def _end_transactions(self) -> None:
        for alias in SENDERS:
            connections[alias].close()
        for (name,) in self.connection.execute("SELECT gid FROM pg_prepared_xacts").fetchall():
            self.connection.execute(f"ROLLBACK PREPARED '{name}'")

    def begin_anew(self) -> None:
        self._end_transactions()
        for table in self.tables:
            self.connection.execute(f"DELETE FROM {table}")
        self.sweep = Pruner(self.sweeper)
        #: What the proxies do between the publisher's next requests.
        self.between: deque[str] = deque()
        #: Whether the proxies have forgotten ids that they knew.
        self.forgot = False
        self.proxies = [Proxy(self.origin) for _ in self.ports]
        for port in self.ports.values():
            port.items.clear()
            port.faults.clear()

    def post(
        self,
        proxy: control_endpoint.Proxy,
        body: bytes,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Replaces `control_endpoint.Proxy.post`, which this calls."""
        try:
            self.ports[proxy.name].post(lambda: POST(proxy, body, meanwhile))
        finally:
            if self.between:
                self.work(self.between.popleft())

    def prepare_faults(self, faults: tuple[list[str], list[str]], between: list[str]) -> None:
        for port, expected in zip(self.ports.values(), faults, strict=True):
            port.faults = deque(expected)
        self.between = deque(between)

    def publisher_is_gone(self) -> None:
        """It can lead for a moment after its end, until PostgreSQL has noticed."""
        for name in ("lock", "unlock"):
            self.connection.execute(f"SELECT pg_advisory_{name}({LOCK_SPACE}, {LEADER_LOCK})")
        for port in self.ports.values():
            port.faults.clear()
        self.between.clear()

    def settle(self, feed: Feed) -> None:
        """Replaces `Feed.settle`: by the time of a repeated hint, nothing is in progress."""
        self.come_to_rest()
        SETTLE(feed)

    def work(self, part: str) -> None:
        """Let the proxies do a part of their pending work."""
        if part in ("items", "fetch"):
            self.pass_items_on()
        for proxy in self.proxies:
            if part == "fetch":
                proxy.fetch()
            elif part == "go on":
                proxy.go_on()

    def pass_items_on(self) -> None:
        """Let the proxies process the items that their control ports took."""
        for port, proxy in zip(self.ports.values(), self.proxies, strict=True):
            items = port.items
            proxy.history += items
            while items:
                proxy.publish(items.pop(0))

    def time_out(self) -> None:
        """All sessions request the next link, as they do every `EVENTSTREAM_NEXT_LINK_TIMEOUT`."""
        for session in self.sessions:
            session.update()
        self.come_to_rest()

    def come_to_rest(self) -> None:
        self.pass_items_on()
        for proxy in self.proxies:
            proxy.come_to_rest()

    @property
    def sessions(self) -> list[Session]:
        return [session for proxy in self.proxies for session in proxy.sessions]

    def pass_time(self, time: timedelta) -> None:
        self.connection.execute(
            "UPDATE pg_eventstream_stream SET sequenced_at = sequenced_at - %s", [time]
        )
        if time:  # at least a minute
            self.forgot = True
            for proxy in self.proxies:
                proxy.known.clear()

    def acknowledged(self) -> int:
        """The position up to which events may be pruned."""
        if not conf.grip_proxies:
            return sys.maxsize
        rows = self.connection.execute("SELECT max(position) FROM pg_eventstream_proxy").fetchall()
        return rows[0][0] or 0

    def positions(self) -> list[int]:
        """The positions that the proxies have acknowledged."""
        rows = self.connection.execute("SELECT name, position FROM pg_eventstream_proxy").fetchall()
        return [dict(rows)[url] for url in self.ports]

    def stream(self) -> list[tuple[Any, ...]]:
        return self.connection.execute(
            """
            SELECT position, s.channel, eid, data FROM pg_eventstream_stream AS s
              LEFT JOIN pg_eventstream_event AS e ON e.id = s.event_id ORDER BY position
            """
        ).fetchall()

    # Backups

    def save(self) -> None:
        """As pg_dump does."""
        with self.connection.transaction():
            for table in self.tables:
                self.connection.execute(f"TRUNCATE saved.{table}")
                self.connection.execute(f"INSERT INTO saved.{table} TABLE {table}")
            self._sequences = self.connection.execute(
                "SELECT sequencename, coalesce(last_value, 1), last_value IS NOT NULL"
                "  FROM pg_sequences WHERE schemaname = 'public'"
            ).fetchall()
        self._histories = [list(proxy.history) for proxy in self.proxies]

    def restore(self, *, stream: bool, consumers: bool, handled: bool) -> None:
        """As ``pg_restore --data-only --disable-triggers`` does with some tables.

        With the stream, what the publisher knows is set back. No stream is open.
        """
        tables = [
            *(STREAM if stream else ()),
            *(CONSUMERS if consumers else ()),
            *(["handled_in_model"] if handled else ()),
        ]
        with self.connection.transaction():
            self.connection.execute("SET LOCAL session_replication_role = replica")
            self.connection.execute("SET LOCAL lock_timeout = '10s'")
            self.connection.execute(f"TRUNCATE {', '.join(tables)}")
            for table in tables:
                self.connection.execute(
                    f"INSERT INTO {table} OVERRIDING SYSTEM VALUE TABLE saved.{table}"
                )
            for name, value, is_called in self._sequences:
                if name.startswith(tuple(f"{table}_" for table in tables)):
                    self.connection.execute("SELECT setval(%s, %s, %s)", [name, value, is_called])
        if stream:
            self.forgot = True
            self.proxies = [Proxy(self.origin) for _ in self.ports]
            for proxy, history in zip(self.proxies, self._histories, strict=True):
                proxy.history = list(history)
            self.sweep = Pruner(self.sweeper)

    def incarnation(self) -> int:
        """The current incarnation of the stream."""
        row = self.connection.execute("SELECT incarnation FROM pg_eventstream_cursor").fetchone()
        assert row is not None
        return int(row[0])

    def user_id(self, name: str) -> str:
        user = self.users[name]
        return "anonymous" if user is None else str(user.pk)


#: That a few events reach, without waiting.
LIMITS = Limits(event_bytes=200, batch_items=3, burst=8, retry=(0, 10), acknowledge=0)
POST, SETTLE = control_endpoint.Proxy.post, Feed.settle
