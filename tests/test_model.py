"""Whatever happens in whatever order, each client gets exactly what a simple model says.

Hypothesis chooses what happens next: senders, callers of sequence(), publishers that are killed
and proxies that fail, sweeps and jumps of time, clients that come, go and resume, and how much of
what is under way between a proxy and the application is done. Nothing runs beside it, so each
run can be repeated. The database, the publisher and the endpoint are real; what lies between
them is `grip_proxy`, and what must come of it says `model`.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import deque
from collections.abc import Iterator
from datetime import timedelta

import hypothesis
import pytest
from django.db import connections, transaction
from django.test import override_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pg_eventstream import (
    EventPermissionError,
    NewEvent,
    channel_permission_changed,
    feed,
    get_current_event_id,
    get_events,
    grip,
    recovery,
    send_event,
    send_events,
    sse,
    views,
)
from pg_eventstream.connection import Database as Connections
from pg_eventstream.doorbell import LEADER_LOCK, LOCK_SPACE
from pg_eventstream.permission import CHANGES
from pg_eventstream.publisher import Publisher
from pg_eventstream.retention import Sweep

from .app.models import Membership
from .conftest import THOROUGH, Database
from .grip_proxy import Session
from .model import DAY, MINUTE, Event, Grant, Model, Transaction, is_reliable
from .model_world import CHANNELS, POISON, SENDERS, Killed, Reader, World
from .test_crash import seeded

pytestmark = pytest.mark.faults

senders = st.sampled_from(SENDERS)
users = st.sampled_from(["anonymous", "ann", "bob"])
channels = st.sampled_from(CHANNELS)
several_channels = st.lists(channels, min_size=1, max_size=3, unique=True).map(sorted)
ends = st.sampled_from(["commit", "commit", "commit", "stay open", "roll back"])
#: How long data is: a few to a page, too long for a page, too long to be published.
lengths = st.sampled_from([1, 1, 60, 150, 300])
#: What becomes of the publisher's next requests.
faults = st.lists(
    st.sampled_from(["", "503", "reset before", "reset after", "killed before", "killed after"]),
    max_size=4,
)
#: What the proxies do of all that they have to do.
parts = st.sampled_from(["", "items", "fetch", "go on"])
proxies = st.integers(0, 1)
numbers = st.integers(0, 8)

EXAMPLES, STEPS = (400, 60) if THOROUGH else (20, 40)
SEQUENCE = "SELECT pg_eventstream_sequence()"
AS_THE_HUB = (
    f"SELECT CASE WHEN pg_try_advisory_xact_lock_shared({LOCK_SPACE}, {LEADER_LOCK})"
    " THEN pg_eventstream_sequence() END"
)


class Interleavings(RuleBasedStateMachine):
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.world.begin_anew()
        self.model = Model()
        self.open: dict[str, Transaction] = {}
        self.prepared: dict[str, Transaction] = {}
        self.clients: list[Reader] = []
        self.sent = 0
        for user, channel in itertools.product(["ann", "bob"], CHANNELS):
            self.change_permission("sender0", user, channel, True, "commit")

    # Senders

    def begin(self, sender: str) -> Transaction:
        if sender not in self.open:
            transaction.set_autocommit(False, sender)
            self.open[sender] = Transaction()
        return self.open[sender]

    @rule(
        sender=senders,
        where=several_channels,
        how=st.sampled_from(["INSERT", "send_event", "send_events"]),
        skipped=st.sets(users, max_size=2),
        length=lengths,
        poisonous=st.sampled_from([False, False, False, True]),
        end=ends,
    )
    def send(
        self,
        sender: str,
        where: list[str],
        how: str,
        skipped: set[str],
        length: int,
        poisonous: bool,
        end: str,
    ) -> None:
        done = self.begin(sender).done
        ids = [self.world.user_id(user) for user in sorted(skipped)]
        new = []
        for channel in where:
            self.sent += 1
            data = f"{self.sent} %I\n{POISON if poisonous else 'x'}{'x' * length}"
            new.append(NewEvent(channel, "message", data, ids, json_encode=False))
            done.append(Event(channel, data, frozenset(ids)))
        if how == "send_events":
            send_events(new, using=sender)
        for event in new if how == "send_event" else ():
            send_event(event.channel, "message", event.data, ids, json_encode=False, using=sender)
        with connections[sender].cursor() as cursor:
            for event in new if how == "INSERT" else ():
                cursor.execute(
                    "INSERT INTO pg_eventstream_event (channel, data, skip_user_ids)"
                    " VALUES (%s, %s, %s)",
                    [event.channel, event.data, ids],
                )
        self.end(sender, end)

    @rule(sender=senders, user=users, channel=channels, granted=st.booleans(), end=ends)
    def change_permission(
        self, sender: str, user: str, channel: str, granted: bool, end: str
    ) -> None:
        right = (self.world.user_id(user), channel)
        others = [self.open[name] for name in self.open if name != sender]
        if any(right in other.rights for other in [*others, *self.prepared.values()]):
            return  # it would wait for the other's end
        done = self.begin(sender).done
        who = self.world.users[user]
        membership = {"user_id": who and who.pk, "channel": channel}
        if granted:
            Membership.objects.using(sender).create(**membership)
            done.append(Grant(right))
        else:
            Membership.objects.using(sender).filter(**membership).delete()
            channel_permission_changed(who, channel, using=sender)
            data = json.dumps({"user": right[0], "channel": channel})
            done.append(Event(CHANGES, data, revokes=right))
        self.end(sender, end)

    @precondition(lambda self: self.open)
    @rule(sender=senders, what=st.sampled_from(["SAVEPOINT", "ROLLBACK TO", "RELEASE"]))
    def savepoint(self, sender: str, what: str) -> None:
        own = self.open.get(sender)
        if own is None or (what != "SAVEPOINT" and not own.savepoints):
            return
        with connections[sender].cursor() as cursor:
            cursor.execute(f"{what} s" if what != "RELEASE" else "RELEASE s")
        if what == "SAVEPOINT":
            own.savepoint()
        elif what == "ROLLBACK TO":
            own.roll_back_to_savepoint()
            with connections[sender].cursor() as cursor:
                cursor.execute("RELEASE s")
        else:
            own.savepoints.pop()

    @precondition(lambda self: self.open)
    @rule(sender=senders, how=st.sampled_from(["commit", "roll back", "prepare"]))
    def end(self, sender: str, how: str) -> None:
        if how == "stay open" or sender not in self.open:
            return
        own = self.open.pop(sender)
        if how == "commit":
            self.model.begin_commit(own)
            transaction.commit(sender)
            self.model.commit(own)
        elif how == "roll back":
            transaction.rollback(sender)
        else:
            name = f"{sender}-{self.sent}-{len(self.prepared)}"
            with connections[sender].cursor() as cursor:
                cursor.execute("SET LOCAL pg_eventstream.bell = off")
                cursor.execute(f"PREPARE TRANSACTION '{name}'")
            self.model.begin_commit(own)
            self.prepared[name] = own
        transaction.set_autocommit(True, sender)

    @precondition(lambda self: self.prepared)
    @rule(number=numbers, how=st.sampled_from(["COMMIT", "ROLLBACK"]))
    def end_prepared(self, number: int, how: str) -> None:
        name = list(self.prepared)[number % len(self.prepared)]
        self.world.connection.execute(f"{how} PREPARED '{name}'")
        prepared = self.prepared.pop(name)
        if how == "COMMIT":
            self.model.commit(prepared)

    # What the publisher does, and others in its place

    @rule(how=st.sampled_from([SEQUENCE, AS_THE_HUB]), as_role=st.booleans())
    def sequence(self, how: str, as_role: bool) -> None:
        caller = self.world.sequencer if as_role else self.world.connection
        assert caller.execute(how).fetchone() == (self.model.sequence(),)

    @precondition(lambda self: self.open)
    @rule(sender=senders, how=st.sampled_from(["commit", "roll back"]))
    def sequence_and_end(self, sender: str, how: str) -> None:
        if sender in self.open:
            with connections[sender].cursor() as cursor:
                cursor.execute(SEQUENCE)
                assert cursor.fetchone() == (len(self.model.waiting),)
            if how == "commit":
                self.model.sequence()
            self.end(sender, how)

    @rule()
    def move_to_another_cluster(self) -> None:
        self.world.connection.execute("UPDATE pg_eventstream_cursor SET cluster = cluster + 1")

    @rule(faults=st.tuples(faults, faults), between=st.lists(parts, max_size=6))
    def publish(self, faults: tuple[list[str], list[str]], between: list[str]) -> None:
        for port, expected in zip(self.world.ports.values(), faults, strict=True):
            port.faults = deque(expected)
        self.world.between = deque(between)
        self.model.sequence()
        try:
            Publisher(Connections("default")).run_once()
        except Killed:
            self.world.pass_items_on()
            for session in self.sessions():
                session.may_lack |= session.missed_hint
        else:
            self.model.sweep(len(self.model.log))
            self.world.come_to_rest()
            for client in self.clients:
                if client.connected and not client.session.may_lack:
                    self.check(client)
        for port in self.world.ports.values():
            port.faults.clear()
        self.world.between.clear()

    @rule(proxy=proxies, start=numbers, length=numbers)
    def suspended_publisher_goes_on(self, proxy: int, start: int, length: int) -> None:
        """It repeats what another one has published meanwhile."""
        suspended = self.world.proxy(proxy)
        for item in suspended.history[start : start + length]:
            suspended.publish(item)

    # Time

    @rule(time=st.sampled_from([2 * MINUTE, 25 * DAY / 24]))
    def pass_time(self, time: timedelta) -> None:
        self.world.connection.execute(
            "UPDATE pg_eventstream_stream SET sequenced_at = sequenced_at - %s", [time]
        )
        self.model.pass_time(time)
        self.world.forget()

    @rule(lasting=st.booleans())
    def sweep(self, lasting: bool) -> None:
        sweep = self.world.sweep if lasting else Sweep(self.world.connection)
        (acknowledged,) = self.world.row("SELECT max(position) FROM pg_eventstream_proxy")
        assert sweep.run_once() == self.model.sweep(acknowledged or 0)

    # Clients

    @precondition(lambda self: len(self.clients) < 5)
    @rule(
        user=users,
        where=several_channels,
        proxy=proxies,
        start=st.sampled_from(["", "", "earliest", "id"]),
        eids=st.tuples(numbers, numbers, numbers),
    )
    def connect(
        self, user: str, where: list[str], proxy: int, start: str, eids: tuple[int, int, int]
    ) -> None:
        client = Reader(self.world, self.model, user, where)
        client.connect(self.world.proxy(proxy), self.start(where, start, eids))
        self.clients.append(client)

    def start(self, where: list[str], start: str, eids: tuple[int, int, int]) -> str:
        if start != "id":
            return start
        # One more than there are is an id of the future.
        tips = {channel: self.model.tip(channel) + 1 for channel in where if is_reliable(channel)}
        return sse.make_id({c: min(eid, tips[c]) for c, eid in zip(tips, eids, strict=False)})

    @precondition(lambda self: self.clients)
    @rule(number=numbers)
    def disconnect(self, number: int) -> None:
        self.clients[number % len(self.clients)].disconnect()

    @precondition(lambda self: self.clients)
    @rule(number=numbers, proxy=proxies)
    def reconnect(self, number: int, proxy: int) -> None:
        client = self.clients[number % len(self.clients)]
        client.disconnect()
        if client.over:
            self.clients.remove(client)
        else:
            client.connect(self.world.proxy(proxy))

    @rule(part=parts)
    def proxies_work(self, part: str) -> None:
        self.world.work(part)

    @precondition(lambda self: self.clients)
    @rule(number=numbers)
    def next_link_times_out(self, number: int) -> None:
        client = self.clients[number % len(self.clients)]
        if client.session is not None:
            client.session.update()

    @rule(
        user=users,
        where=several_channels,
        start=st.sampled_from(["earliest", "id"]),
        eids=st.tuples(numbers, numbers, numbers),
        limit=st.integers(1, 4),
    )
    def read(
        self, user: str, where: list[str], start: str, eids: tuple[int, int, int], limit: int
    ) -> None:
        reader = Reader(self.world, self.model, user, where)
        last_event_id = self.start(where, start, eids)
        reader.begin(last_event_id)
        assert get_current_event_id(where) == sse.make_id(
            {channel: self.model.tip(channel) for channel in reader.reliable}
        )
        if not reader.allowed:
            with pytest.raises(EventPermissionError):
                get_events(where, last_event_id, user=self.world.users[user])
            return
        page = get_events(where, last_event_id, limit, user=self.world.users[user])
        assert sorted(page.reset) == reader.gone()
        for channel in page.reset:
            reader.seen[channel] = self.model.tip(channel)
        events = page.events
        while page.more:
            page = get_events(where, page.last_event_id, limit, user=self.world.users[user])
            assert page.reset == []
            events += page.events
        assert [(event.channel, event.eid, event.data) for event in events] == [
            (event.channel, event.eid, event.data) for event in reader.missing()
        ]

    # What is always so, and what is so in the end

    def sessions(self) -> list[Session]:
        return [session for proxy in self.world.proxies for session in proxy.sessions]

    def check(self, client: Reader) -> None:
        """It has everything, as nothing is under way."""
        assert client.allowed
        assert client.missing() == []
        assert client.missing_volatile() == []

    @invariant()
    def stream_is_the_log(self) -> None:
        rows = self.world.connection.execute(
            """
            SELECT position, s.channel, eid, data FROM pg_eventstream_stream AS s
              LEFT JOIN pg_eventstream_event AS e ON e.id = s.event_id ORDER BY position
            """
        ).fetchall()
        assert rows == [
            (event.position, event.channel, event.eid, event.data)
            for event in self.model.log
            if not event.pruned
        ]

    def teardown(self) -> None:
        if sys.exc_info()[0] is not None:
            return  # it has failed already
        for sender in list(self.open):
            self.end(sender, "roll back")
        while self.prepared:
            self.end_prepared(0, "COMMIT")
        for client in self.clients:
            if not client.connected and not client.over:
                client.connect(self.world.proxy(0))
        self.publish(([], []), [])
        for session in self.sessions():
            session.update()  # at its next link's timeout
        self.world.come_to_rest()
        for client in self.clients:
            if client.connected:
                self.check(client)
            else:
                assert client.over


@pytest.fixture
def world(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    # Limits that a few events reach.
    monkeypatch.setattr(grip, "EVENT_BYTES", 200)
    monkeypatch.setattr(grip, "BATCH_ITEMS", 3)
    monkeypatch.setattr(grip.Hints, "_MANY", 3)
    monkeypatch.setattr(feed, "_PAGE_EVENTS", 3)
    monkeypatch.setattr(recovery, "PAGE_BYTES", 150)
    monkeypatch.setattr(views, "_FIRST_BYTES", 300)
    # No waiting.
    monkeypatch.setattr(feed, "_FIRST_RETRY", 0)
    monkeypatch.setattr(feed, "_ACKNOWLEDGE_SECONDS", 0)
    with World(database) as world:
        monkeypatch.setattr(grip.Proxy, "post", lambda *args, **kw: world.post(*args, **kw))
        monkeypatch.setattr(feed.Feed, "settle", lambda feed: world.settle(feed))
        with override_settings(
            GRIP_PROXIES=[port.config for port in world.ports.values()],
            EVENTSTREAM_CHANNELMANAGER_CLASS="tests.channelmanagers.VolatileMembers",
        ):
            yield world


def test_every_client_gets_exactly_what_the_model_says(world: World) -> None:
    class Machine(Interleavings):
        pass

    Machine.world = world
    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        derandomize=not THOROUGH,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    machine = hypothesis.seed(seeded().randrange(2**32))(Machine) if THOROUGH else Machine
    run_state_machine_as_test(machine, settings=settings)
