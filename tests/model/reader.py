"""A client of the model test, which rejects everything that the model does not expect."""

from __future__ import annotations

import json

import pytest

from pg_eventstream import EventPermissionError, get_current_event_id, get_events, sse
from tests.model.model import Event, Model, is_reliable, is_unreliable
from tests.model.world import LIMITS, POISON, World
from tests.support.grip_proxy import Proxy, Session
from tests.support.origin import Answer
from tests.support.sse_client import Received, eids_of


class Reader:
    """A client that rejects everything that the model does not expect."""

    def __init__(self, world: World, model: Model, user: str, channels: list[str]) -> None:
        self.world = world
        self.model = model
        self.user, self.user_id = user, world.user_id(user)
        self.channels = channels
        self.reliable = [channel for channel in channels if is_reliable(channel)]
        self.last_event_id = ""
        #: The eids up to which it has seen everything.
        self.seen: dict[str, int] = {}
        self.volatile: list[Event] = []
        self.held_at = 0
        self.session: Session
        self.proxy: Proxy
        self.over = False

    def begin(self, after: str) -> None:
        """It has seen everything up to this id."""
        if after == "earliest":
            self.seen = {channel: self.model.pruned(channel) for channel in self.reliable}
        else:
            asked = eids_of(after)
            self.seen = {c: asked.get(c, self.model.tip(c)) for c in self.reliable}
        self._opens_at = self.seen

    def connect(self, proxy: Proxy, asked: str | None = None) -> None:
        """Open a stream after the given id, or else where the last one ended."""
        after = self.last_event_id if asked is None else asked
        seen = self.seen
        self.begin(after)
        if asked is None and after:
            self.seen = seen  # as good as the content of the id
        self.volatile = []
        self.proxy = proxy
        self.session = proxy.open(self, self.channels, after, self.world.cookies[self.user])

    def disconnect(self) -> None:
        if self.connected:
            self.proxy.close(self.session)

    @property
    def connected(self) -> bool:
        return self.session in self.proxy.sessions

    @property
    def allowed(self) -> bool:
        return all(self.model.may_read(self.user_id, channel) for channel in self.channels)

    def gone(self) -> list[str]:
        """The channels for which a stream that opens now must report lost events."""
        return [
            channel
            for channel, eid in self._opens_at.items()
            if not self.model.pruned(channel) <= eid <= self.model.tip(channel)
        ]

    # What the proxy sends

    def answered(self, answer: Answer) -> None:
        assert self.allowed != ("stream-error" in answer.control)
        reset = answer.control.get("stream-reset")
        gone = json.loads(reset.data)["channels"] if reset else []
        if "stream-open" in answer.control:
            assert gone == self.gone()
            tips = {channel: self.model.tip(channel) for channel in gone}
            assert answer.control["stream-open"].eids == {**self._opens_at, **tips}
        for channel in gone:
            behind = self.seen[channel] < self.model.pruned(channel)
            assert behind or self.seen[channel] > self.model.tip(channel)
            assert reset.eids[channel] == self.model.tip(channel)  # type: ignore[union-attr]

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
        # If a hint was missed, permission is checked when the publisher repeats it.
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
        # Resuming from this id loses and repeats nothing.
        assert ids.keys() == self.seen.keys()
        assert self.model.after(self.reliable, ids, self.user_id) == self.missing()

    def held(self) -> None:
        self.held_at = len(self.model.log)

    def read(self, last_event_id: str, limit: int) -> None:
        """Read the same by `get_events`, page by page, instead of a stream."""
        user = self.world.users[self.user]
        self.begin(last_event_id)
        tips = {channel: self.model.tip(channel) for channel in self.reliable}
        assert get_current_event_id(self.channels) == sse.make_id(self.model.numbers(tips))
        if not self.allowed:
            with pytest.raises(EventPermissionError):
                get_events(self.channels, last_event_id, limit, user)
            return
        page = get_events(self.channels, last_event_id, limit, user)
        assert page.reset == self.gone()
        self.seen = {**self.seen, **{channel: tips[channel] for channel in page.reset}}
        events = page.events
        while page.more:
            page = get_events(self.channels, page.last_event_id, limit, user)
            assert page.reset == []
            events += page.events
        assert [(event.channel, event.eid, event.data) for event in events] == [
            (event.channel, event.eid, event.data) for event in self.missing()
        ]

    # What it still lacks

    def check(self) -> None:
        """It has everything, because nothing is in progress."""
        assert self.allowed
        assert self.missing() == []
        assert self.missing_volatile() == []

    def missing(self, channels: list[str] | None = None) -> list[Event]:
        return self.model.after(channels or self.reliable, self.seen, self.user_id)

    def missing_volatile(self) -> list[Event]:
        """Those of the events that were sequenced since its stream is held."""
        held_at = dict.fromkeys(self.channels, 0)
        wanted = self.model.after(filter(is_unreliable, self.channels), held_at, self.user_id)
        return [
            event
            for event in wanted
            if event.position > self.held_at
            and not event.pruned
            and is_published(event)
            and event not in self.volatile
        ]


def is_published(event: Event) -> bool:
    """Whether it is published itself, and not as a hint."""
    return len(event.data) <= LIMITS.event_bytes and POISON not in event.data
