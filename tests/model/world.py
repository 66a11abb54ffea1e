"""The world of the model test: a database, two proxies that fail on demand, and clients."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

from django.contrib.auth.models import User
from django.db import connections

from pg_eventstream.consumers.checkpoints import EARLIEST
from pg_eventstream.grip import proxy as control_endpoint
from pg_eventstream.limits import Limits
from pg_eventstream.postgres.locks import LEADER_LOCK, LOCK_SPACE, PRUNE_LOCK
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

    tables = (
        *(f"pg_eventstream_{name}" for name in ("event", "outbox", "stream", "channel", "cursor")),
        *(f"pg_eventstream_{name}" for name in ("consumer", "checkpoint", "slot", "parked")),
        *("pg_eventstream_publisher", "pg_eventstream_proxy", "app_membership"),
        "handled_in_model",
    )

    def __init__(self, database: Database) -> None:
        # Committed events are visible to others; whether they are on a disk does not matter here.
        database.execute(f"ALTER DATABASE {database.name} SET synchronous_commit = off")
        database.execute(HANDLED)
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

    def reset(self, name: str) -> None:
        """Let a consumer handle everything again that is kept."""
        # What it has made of the events is deleted.
        self.connection.execute("DELETE FROM handled_in_model WHERE consumer = %s", [name])
        with self.connection.transaction():
            self.connection.execute(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {PRUNE_LOCK})")
            self.connection.execute(
                """
                UPDATE pg_eventstream_slot AS s
                   SET lost = NULL, failing = NULL, attempts = 0, error = '', stopped = false,
                       retry_at = NULL, replay_to = greatest(replay_to, position)
                  FROM pg_eventstream_checkpoint AS c JOIN pg_eventstream_consumer AS k
                       ON k.id = c.consumer_id
                 WHERE (s.consumer_id, s.slot) = (c.consumer_id, c.slot) AND name = %s
                """,
                [name],
            )
            self.connection.execute(
                f"""
                WITH k AS (UPDATE pg_eventstream_consumer SET epoch = epoch + 1
                            WHERE name = %s RETURNING id)
                UPDATE pg_eventstream_checkpoint SET epoch = epoch + 1, position = ({EARLIEST})
                  FROM k WHERE consumer_id = k.id
                """,
                [name],
            )

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
