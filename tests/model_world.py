"""What the model test acts upon: a database, two proxies that fail when told, and clients."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

from django.contrib.auth.models import User
from django.db import connections

from pg_eventstream import grip, sse
from pg_eventstream.feed import Feed
from pg_eventstream.retention import Sweep

from .conftest import KEY, Database
from .grip_proxy import Proxy, Session
from .http_service import body_of
from .model import Event, Model, is_reliable, is_unreliable
from .origin import Answer, Origin, log_in
from .roles import granted
from .sse_client import Received
from .test_publisher import ControlPort

CHANNELS = ["public", "public b, c", "room", "volatile"]
SENDERS = ["sender0", "sender1", "sender2"]
#: Events with this text are refused by the proxies.
POISON = "poison"


class Killed(Exception):
    """The publisher, by kill -9."""


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
        """One request of the publisher, or what becomes of it."""
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
    """What all runs share; `begin_anew` empties the tables in between."""

    def __init__(self, database: Database) -> None:
        self.database = database
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
        for alias in SENDERS:
            connections[alias].close()
            del connections.settings[alias]
            delattr(connections._connections, alias)  # type: ignore[attr-defined]
        self._stack.close()

    def begin_anew(self) -> None:
        for alias in SENDERS:
            connections[alias].close()
        for (name,) in self.connection.execute("SELECT gid FROM pg_prepared_xacts").fetchall():
            self.connection.execute(f"ROLLBACK PREPARED '{name}'")
        self.connection.execute(
            "TRUNCATE pg_eventstream_event, pg_eventstream_outbox, pg_eventstream_stream,"
            " pg_eventstream_channel, pg_eventstream_cursor, pg_eventstream_publisher,"
            " pg_eventstream_proxy, app_membership RESTART IDENTITY"
        )
        self.sweep = Sweep(self.sweeper)
        #: What the proxies do between the publisher's next requests.
        self.between: deque[str] = deque()
        #: Whether the proxies have forgotten ids that they knew.
        self.forgot = False
        self.proxies = [Proxy(self.origin) for _ in self.ports]
        for port in self.ports.values():
            port.items.clear()
            port.faults.clear()

    def post(
        self, proxy: grip.Proxy, body: bytes, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """In place of `grip.Proxy.post`, which this calls."""
        try:
            self.ports[proxy.name].post(lambda: POST(proxy, body, meanwhile))
        finally:
            if self.between:
                self.work(self.between.popleft())

    def settle(self, feed: Feed) -> None:
        """In place of `Feed.settle`: by the time of a repeated hint, nothing is under way."""
        self.come_to_rest()
        SETTLE(feed)

    def work(self, part: str) -> None:
        """The proxies do a part of what is to be done."""
        if part in ("items", "fetch"):
            self.pass_items_on()
        for proxy in self.proxies:
            if part == "fetch":
                proxy.fetch()
            elif part == "go on":
                proxy.go_on()

    def pass_items_on(self) -> None:
        """The proxies work on what their control ports took."""
        for port, proxy in zip(self.ports.values(), self.proxies, strict=True):
            items = port.items
            proxy.history += items
            while items:
                proxy.publish(items.pop(0))

    def come_to_rest(self) -> None:
        self.pass_items_on()
        for proxy in self.proxies:
            proxy.come_to_rest()

    def proxy(self, number: int) -> Proxy:
        return self.proxies[number]

    def forget(self) -> None:
        """The proxies remember ids for a minute only."""
        self.forgot = True
        for proxy in self.proxies:
            proxy.known.clear()

    def row(self, query: str) -> tuple[Any, ...]:
        row = self.connection.execute(query).fetchone()
        assert row is not None
        return row

    def user_id(self, name: str) -> str:
        user = self.users[name]
        return "anonymous" if user is None else str(user.pk)


POST, SETTLE = grip.Proxy.post, Feed.settle


class Reader:
    """A client, which finds fault with everything that the model does not expect."""

    def __init__(self, world: World, model: Model, user: str, channels: list[str]) -> None:
        self.world = world
        self.model = model
        self.user, self.user_id = user, world.user_id(user)
        self.channels = channels
        self.reliable = [channel for channel in channels if is_reliable(channel)]
        self.last_event_id = ""
        #: Up to where it has seen everything.
        self.seen: dict[str, int] = {}
        self.volatile: list[Event] = []
        self.held_at = 0
        self.session: Session | None = None
        self.proxy: Proxy | None = None
        self.over = False

    def begin(self, after: str) -> None:
        """It has seen everything up to this id."""
        if after == "earliest":
            self.seen = {channel: self.model.pruned(channel) for channel in self.reliable}
        else:
            asked = sse.parse_id(after) if after else {}
            self.seen = {c: asked.get(c, self.model.tip(c)) for c in self.reliable}
        self._opens_at = self.seen

    def connect(self, proxy: Proxy, asked: str | None = None) -> None:
        """Open a stream behind the id that is asked for, or else where the last one ended."""
        after = self.last_event_id if asked is None else asked
        seen = self.seen
        self.begin(after)
        if asked is None and after:
            self.seen = seen  # as good as what the id says
        self.volatile = []
        self.proxy = proxy
        self.session = proxy.open(self, self.channels, after, self.world.cookies[self.user])

    def disconnect(self) -> None:
        if self.connected:
            self.proxy.close(self.session)  # type: ignore[union-attr, arg-type]
        self.session = None

    @property
    def connected(self) -> bool:
        return self.session is not None and self.session in self.proxy.sessions  # type: ignore[union-attr]

    @property
    def allowed(self) -> bool:
        return all(self.model.may_read(self.user_id, channel) for channel in self.channels)

    def gone(self) -> list[str]:
        """Where a stream that opens now has to say that events are gone."""
        return [
            channel
            for channel, eid in self._opens_at.items()
            if not self.model.pruned(channel) <= eid <= self.model.tip(channel)
        ]

    # What the proxy tells it

    def answered(self, answer: Answer) -> None:
        assert self.allowed != ("stream-error" in answer.control)
        reset = answer.control.get("stream-reset")
        gone = json.loads(reset.data)["channels"] if reset else []
        if "stream-open" in answer.control:
            assert gone == self.gone()
            tips = {channel: self.model.tip(channel) for channel in gone}
            assert answer.control["stream-open"].id == sse.make_id({**self._opens_at, **tips})
        for channel in gone:
            behind = self.seen[channel] < self.model.pruned(channel)
            assert behind or self.seen[channel] > self.model.tip(channel)
            assert sse.parse_id(reset.id)[channel] == self.model.tip(channel)  # type: ignore[union-attr]

    def receive(self, event: Received) -> None:
        if event.type == "stream-error":
            assert json.loads(event.data)["condition"] == "forbidden"
            self.over = True
        elif event.type == "stream-reset":
            for channel in json.loads(event.data)["channels"]:
                self.seen[channel] = event.eids[channel]
        elif event.type != "stream-open":
            self._take(event)
        self.last_event_id = event.id.strip() or self.last_event_id

    def _take(self, received: Received) -> None:
        event = next((e for e in self.model.log if e.data == received.data), None)
        assert event is not None, "never committed, or not in the stream yet"
        assert event.channel in self.channels
        assert self.user_id not in event.skipped
        assert self.session is not None
        # Where a hint was missed, permission is asked for when the publisher repeats it.
        excused = self.session.missed_hint or self.session.may_lack
        assert self.model.may_get(self.user_id, event) or excused
        if is_unreliable(event.channel):
            assert received.id == ""
            # The proxy drops what it takes again within a minute.
            in_order = all(other.position < event.position for other in self.volatile)
            assert in_order or self.world.forgot
            self.volatile.append(event)
            return
        assert self.missing([event.channel])[0] is event
        self.seen[event.channel] = event.eid
        ids = received.eids
        assert ids[event.channel] == event.eid
        # To resume from this id is to miss nothing and to get nothing again.
        assert ids.keys() == self.seen.keys()
        assert self.model.after(self.reliable, ids, self.user_id) == self.missing()

    def held(self) -> None:
        self.held_at = len(self.model.log)

    # What it still lacks

    def missing(self, channels: list[str] | None = None) -> list[Event]:
        return self.model.after(channels or self.reliable, self.seen, self.user_id)

    def missing_volatile(self) -> list[Event]:
        """Of what was sequenced since its stream is held."""
        held_at = dict.fromkeys(self.channels, 0)
        wanted = self.model.after(filter(is_unreliable, self.channels), held_at, self.user_id)
        return [
            event
            for event in wanted
            if event.position > self.held_at
            and not event.pruned
            and len(event.data) <= grip.EVENT_BYTES
            and POISON not in event.data
            and event not in self.volatile
        ]
