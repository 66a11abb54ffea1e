"""In any order of events, each client gets exactly what a simple model says.

Hypothesis chooses what happens next: senders, callers of sequence(), publishers that are killed and
proxies that fail, pruning and jumps of time, backups and their restore, clients that come, leave
and resume, and how much of the pending work between a proxy and the application is done. Nothing
runs concurrently, so each run can be repeated. The database, the publisher and the endpoint are
real. `grip_proxy` stands for everything between them, and `model` says what the result must be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import hypothesis
import pytest
from django.test import override_settings
from hypothesis import strategies as st

from pg_eventstream import endpoint, sse
from pg_eventstream.grip import names
from pg_eventstream.grip.proxy import Proxy
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.postgres.locks import LEADER_LOCK, LOCK_SPACE
from pg_eventstream.publisher import drain as once
from pg_eventstream.publisher import feed
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.publisher.pruner import Pruner
from pg_eventstream.streams import replay
from tests.model.consumers import CONSUMERS, Consumers
from tests.model.model import DAY, HOLD, Model, is_reliable
from tests.model.reader import Reader, is_published
from tests.model.senders import Permit, Send, Senders
from tests.model.steps import OF_ALL, OF_CONSUMERS, steps
from tests.model.world import CHANNELS, LIMITS, SENDERS, Killed, World
from tests.support.chance import seeded
from tests.support.database import Database
from tests.support.environment import THOROUGH

# Shrinking a failing example can take five minutes.
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600 if THOROUGH else 900)]

SEQUENCE = "SELECT pg_eventstream_sequence()"
AS_THE_HUB = (
    f"SELECT CASE WHEN pg_try_advisory_xact_lock_shared({LOCK_SPACE}, {LEADER_LOCK})"
    " THEN pg_eventstream_sequence() END"
)
EXAMPLES, STEPS = (300, 60) if THOROUGH else (5, 40)
MOST_CLIENTS = 5


class Run:
    """One order of steps, and the checks after each of them."""

    def __init__(self, world: World) -> None:
        world.begin_anew()
        self.world = world
        self.model = Model()
        self.senders = Senders(self.world, self.model)
        self.consumers = Consumers(self.world, self.model)
        self.clients: list[Reader] = []
        for user, channel in itertools.product(["ann", "bob"], CHANNELS):
            self.senders.act(SENDERS[0], Permit(user, channel, True))
        self.senders.end(SENDERS[0], "COMMIT")
        self.back_up()

    def connect(self, user: str, where: list[str], proxy: int, after: str = "") -> None:
        client = Reader(self.world, self.model, user, where)
        client.connect(self.world.proxies[proxy], after)
        self.clients.append(client)

    # Senders

    def transact(self, sender: str, acts: list[Send | Permit | str], end: str) -> None:
        for act in acts:
            self.senders.act(sender, act)
        if end and sender in self.senders.open:
            self.senders.end(sender, end)

    def end_prepared(self, number: int, how: str) -> None:
        if self.senders.prepared:
            self.senders.end_prepared(number, how)

    # The publisher's work, also done by others

    def sequence(self, caller: str, how: str) -> None:
        if caller == "a sender":
            for sender in list(self.senders.open)[:1]:
                self.senders.sequence_and_end(sender, how)
        elif caller.startswith("nobody"):
            self.reset_those_ahead()
            self.world.connection.execute("UPDATE pg_eventstream_cursor SET cluster = 1")
        else:
            connection = self.world.sequencer if caller == "a role" else self.world.connection
            row = connection.execute(AS_THE_HUB if caller == "the hub" else SEQUENCE).fetchone()
            assert row == (self.model.sequence(),)
        self.check_stream()

    def publish(self, faults: tuple[list[str], list[str]], between: list[str]) -> None:
        self.world.prepare_faults(faults, between)
        self.model.sequence()
        try:
            Publisher(Connector("default", limits=LIMITS)).run_once()
        except Killed:
            self.world.pass_items_on()
            for session in self.world.sessions:
                session.may_lack |= session.missed_hint
        else:
            self.model.sweep(len(self.model.log))
            self.world.come_to_rest()
            for client in self.clients:
                if client.connected and not client.session.may_lack:
                    client.check()
        self.world.publisher_is_gone()
        self.check_stream()
        self.check_acknowledged()

    def sweep(self, time: timedelta, lasting: bool) -> None:
        if time > DAY:
            self.world.time_out()  # repeatedly, before it is over
        self.world.pass_time(time)
        self.model.pass_time(time)
        sweep = self.world.sweep if lasting else Pruner(self.world.connection)
        acknowledged = self.world.acknowledged()
        assert sweep.run_once() == self.model.sweep(acknowledged)
        self.check_stream()

    # Consumers

    def consume(self, name: str, what: str, count: int) -> None:
        if what in ("resets", "skips"):
            self.consumers.reset(name, earliest=what == "resets")
        else:
            self.consumers.handle(name, count if what == "crashes" else None)
        self.check_stream()

    # Backups

    def back_up(self) -> None:
        self.reset_those_ahead()
        self.world.save()
        self.saved = self.model.save()

    def restore(self, what: str, handled: bool) -> None:
        """Set tables back: all, those of the stream, or those of the consumers.

        Clients and proxies are started anew: what they do is tested without consumers.
        """
        stream, consumers = what != "consumers", what != "stream"
        self.reset_those_ahead()
        for sender in list(self.senders.open):
            self.senders.end(sender, "ROLLBACK")
        while self.senders.prepared:
            self.senders.end_prepared(0, "ROLLBACK")
        if stream:
            self.world.come_to_rest()
            for client in self.clients:
                client.disconnect()
            self.clients.clear()
        chosen = {"stream": stream, "consumers": consumers, "handled": consumers and handled}
        self.world.restore(**chosen)
        self.model.restore(self.saved, **chosen)
        if stream:
            # Until then, consumers are told more than is lost, and the pruner holds more.
            assert self.world.sequencer.execute(SEQUENCE).fetchone() == (self.model.sequence(),)
        self.check_stream()

    def reset_those_ahead(self) -> None:
        """As their errors say. A stream that is replaced twice does not show it any more."""
        for name, follower in self.model.followers.items():
            if self.model.is_ahead(follower):
                self.consumers.reset(name)

    # Proxies and clients

    def proxies_work(self, part: str, proxy: int, first: int, count: int) -> None:
        if part:
            self.world.work(part)
            return
        # A publisher that was suspended repeats what another one has published in the meantime.
        for item in self.world.proxies[proxy].history[first : first + count]:
            self.world.proxies[proxy].publish(item)

    def client_comes(
        self,
        user: str,
        where: list[str],
        proxy: int,
        start: str,
        ids: tuple[int, int, int],
        at_once: bool,
    ) -> None:
        if len(self.clients) == MOST_CLIENTS:
            self.clients.pop(0).disconnect()
        self.connect(user, where, proxy, self.start(where, start, ids))
        if at_once:
            self.world.come_to_rest()

    def start(self, where: list[str], start: str, ids: tuple[int, int, int]) -> str:
        if start != "id":
            return start
        # One more than there are is an id of the future.
        tips = {channel: self.model.tip(channel) + 1 for channel in where if is_reliable(channel)}
        eids = {c: min(eid, tips[c]) for c, eid in zip(tips, ids, strict=False)}
        return sse.make_id(self.model.numbers(eids))

    def client(self, number: int, what: str, proxy: int, at_once: bool) -> None:
        client = self.clients[number % len(self.clients)] if self.clients else None
        if client is None or client.over:
            return
        if what == "asks":
            client.session.update()  # at its next link's timeout
        else:
            client.disconnect()
        if what == "resumes":
            client.connect(self.world.proxies[proxy])
        if at_once:
            self.world.come_to_rest()

    def read(
        self, user: str, where: list[str], start: str, ids: tuple[int, int, int], limit: int
    ) -> None:
        reader = Reader(self.world, self.model, user, where)
        reader.read(self.start(where, start, ids), limit)

    # At the end

    def check_stream(self) -> None:
        """The part of the log that is kept is in the database."""
        assert self.world.stream() == [
            (event.position, event.channel, event.eid, event.data)
            for event in self.model.log
            if not event.pruned
        ]
        for event in self.model.log:
            if event.incarnation < 0:
                event.incarnation = self.world.incarnation()

    def check_acknowledged(self) -> None:
        """A proxy has taken everything that is recorded as acknowledged."""
        for proxy, position in zip(self.world.proxies, self.world.positions(), strict=True):
            taken = {(item["channel"], item.get("id")) for item in proxy.history}
            for event in self.model.log[:position]:
                if is_reliable(event.channel) and not event.pruned and is_published(event):
                    number = str(event.eid + event.incarnation)
                    assert (names.events_channel(event.channel), number) in taken

    def end(self) -> None:
        """Complete everything; after that no client lacks an event."""
        self.commit()
        self.publish(([], []), [])
        self.rebuild()
        for client in self.clients:
            if not client.connected and not client.over:
                client.connect(self.world.proxies[0])
        for user in self.world.users:
            for start in ("earliest", "id"):
                self.read(user, CHANNELS, start, (0, 0, 0), 3)
            self.connect(user, [c for c in CHANNELS if c.startswith("public")], 1, "earliest")
        self.world.come_to_rest()
        # Each event alone: no later one reveals a gap.
        for length, poisonous in ((300, False), (1, True), (1, False)):
            last = Send(CHANNELS, "INSERT", set(), length, poisonous)
            self.transact(SENDERS[0], [last], "COMMIT")
            self.publish(([], []), [])
        self.world.time_out()
        for client in self.clients:
            assert client.connected != client.over
            if client.connected:
                client.check()

    def commit(self) -> None:
        self.sequence("a sender", "COMMIT")
        for sender in reversed(list(self.senders.open)):
            self.senders.end(sender, "COMMIT")
        while self.senders.prepared:
            self.senders.end_prepared(0, "COMMIT")

    def rebuild(self) -> None:
        """Consumers handle everything again, and what they have not handled."""
        for name in CONSUMERS:
            self.consume(name, "resets", 0)
            self.consume(name, "handles", 0)


def in_turn(drain: once.Drain) -> bool:
    """Replaces `Drain.is_over`: the feeds work one after the other, until one is killed."""
    for work in drain._works:
        work.run()
        if work.error is not None:
            break
    return True


@pytest.fixture
def world(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    # Pages that a few events fill.
    monkeypatch.setattr(replay, "PAGE_BYTES", 150)
    monkeypatch.setattr(endpoint, "_FIRST_BYTES", 300)
    with World(database) as world:
        monkeypatch.setattr(Proxy, "post", lambda *args, **kw: world.post(*args, **kw))
        monkeypatch.setattr(feed.Feed, "settle", lambda feed: world.settle(feed))
        # The world has no threads, and random draws decide what happens.
        monkeypatch.setattr(once.Drain, "is_over", in_turn)
        for method in ("start", "join"):
            monkeypatch.setattr(once._Work, method, lambda *args: None)
        with override_settings(
            GRIP_PROXIES=[port.config for port in world.ports.values()],
            EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.VolatileMembers",
            EVENTSTREAM_CONSUMER_HOLD=HOLD,
        ):
            yield world


def explore(world: World, examples: int, often: dict[str, int], end: Callable[[Run], None]) -> None:
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=not THOROUGH,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.lists(steps(often), min_size=STEPS // 2, max_size=STEPS))
    def run(chosen: list[tuple[str, dict[str, Any]]]) -> None:
        run = Run(world)
        for step, arguments in chosen:
            getattr(run, step)(**arguments)
        end(run)

    (hypothesis.seed(seeded().random())(run) if THOROUGH else run)()


def test_every_client_gets_exactly_what_the_model_says(world: World) -> None:
    explore(world, EXAMPLES, OF_ALL, Run.end)


@override_settings(GRIP_PROXIES=[])
def test_consumers_handle_exactly_what_the_model_says_after_restores(world: World) -> None:
    """Without a publisher, so that more happens to the consumers."""

    def end(run: Run) -> None:
        run.commit()
        run.rebuild()

    explore(world, EXAMPLES if THOROUGH else 2, OF_CONSUMERS, end)
