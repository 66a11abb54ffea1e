"""Pruning and consumers: what a consumer has not handled is kept for a while, or it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO

import pytest
from django.core.management import call_command
from django.db import connection as django_connection
from django.test import override_settings

from pg_eventstream import send_event, send_events
from pg_eventstream.consumers import ConsumedEvent, Retry, checkpoints, consumer, declare
from pg_eventstream.consumers.runner import Runner
from pg_eventstream.consumers.worker import Worker
from pg_eventstream.errors import ConsumerMissedEvents
from pg_eventstream.limits import LIMITS
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.postgres.slots import SLOTS, slot_of
from pg_eventstream.publisher import pruner
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.publisher.pruner import Pruner
from pg_eventstream.rarely import Rarely
from pg_eventstream.servers.processes import wait_until
from tests.support.chance import seeded
from tests.support.consumers import ConsumerProcess, Handled, declared, recorder
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.environment import THOROUGH, settings_everywhere
from tests.support.roles import as_role, granted
from tests.support.stored import DAY, age, make_older

WEEK = 7 * DAY


def prune(database: Database) -> int:
    with database.connect() as connection:
        return Pruner(connection).run_once()


def registered(database: Database, *consumers: declare.Consumer) -> None:
    with database.connect() as connection:
        for each in consumers:
            checkpoints.register(connection, each)


def send(database: Database, channel: str, count: int) -> None:
    send_events([(channel, "message", n) for n in range(count)])
    database.execute("SELECT pg_eventstream_sequence()")


def run(database: Database, own: declare.Consumer, steps: int = 4) -> None:
    """Let one process do so much, step by step."""
    (consumer_id,) = database.fetch("SELECT id FROM pg_eventstream_consumer")[0]
    runner = Runner(own, consumer_id, "default", "here:1/a", LIMITS)
    runner.grant(range(SLOTS))
    for _ in range(steps):
        runner.step()
    runner.close()
    django_connection.close()


def kept(database: Database) -> int:
    return int(database.value("SELECT count(*) FROM pg_eventstream_stream"))


def lost(database: Database) -> dict[tuple[str, int], int]:
    return {
        (name, slot): position
        for name, slot, position in database.fetch(
            "SELECT name, slot, lost FROM pg_eventstream_slot AS s"
            "  JOIN pg_eventstream_consumer AS k ON k.id = s.consumer_id WHERE lost IS NOT NULL"
        )
    }


def test_lagging_consumer_holds_pruning(database: Database, handled: Handled) -> None:
    fast, slow = recorder("fast"), recorder("slow", channels=["a"])
    registered(database, fast, slow)
    send(database, "a", 3)
    send(database, "b", 2)
    assert fast.drain() == 5
    make_older(database, WEEK.total_seconds() - 60)
    assert prune(database) == 0  # also of what it does not follow
    send(database, "a", 1)
    assert slow.drain() == 4
    assert prune(database) == 5
    assert kept(database) == 1
    assert fast.drain() == 1
    make_older(database, 2 * DAY.total_seconds())
    assert prune(database) == 1
    assert lost(database) == {}
    assert fast.drain() == slow.drain() == 0


def test_consumer_that_is_too_late_is_told_and_never_skips(
    database: Database, handled: Handled, caplog: pytest.LogCaptureFixture
) -> None:
    stock, other = recorder("stock", channels=["a"]), recorder("other", prefixes=["b-"])
    everything, indifferent = recorder("everything"), recorder("indifferent", channels=["z"])
    registered(database, stock, other, everything, indifferent)
    send(database, "a", 3)
    send(database, "b-1", 2)
    make_older(database, WEEK.total_seconds() - 60)
    assert everything.drain() == 5
    assert prune(database) == 0
    send(database, "a", 2)
    make_older(database, 120)
    assert prune(database) == 5
    assert lost(database) == {("stock", slot_of("a")): 3, ("other", slot_of("b-1")): 5}
    [record] = [r for r in caplog.records if getattr(r, "event", "") == "consumers-missed-events"]
    assert record.consumers == ["other", "stock"]  # type: ignore[attr-defined]
    for late, position in ((stock, 3), (other, 5)):
        with pytest.raises(ConsumerMissedEvents, match=f"up to position {position}") as missed:
            late.drain()
        assert missed.value.position == position
    assert handled.count("stock") == handled.count("other") == 0
    assert everything.drain() == 2
    assert indifferent.drain() == 0
    # The rest is kept for it, until that is too old as well.
    make_older(database, WEEK.total_seconds())
    assert prune(database) == 2
    assert lost(database)[("stock", slot_of("a"))] == 7


@pytest.mark.parametrize(("retention", "hold"), [(3600, 60), (3600, 3600), (3600, 7200)])
def test_hold_counts_from_the_same_moment_as_the_retention(
    database: Database, handled: Handled, retention: int, hold: int
) -> None:
    registered(database, recorder("stock"))
    send(database, "a", 1)
    with override_settings(EVENTSTREAM_RETENTION=retention, EVENTSTREAM_CONSUMER_HOLD=hold):
        make_older(database, max(retention, hold) - 30)
        assert prune(database) == 0
        make_older(database, 60)
        assert prune(database) == 1
    assert lost(database) == {("stock", slot_of("a")): 1}


@override_settings(
    EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Volatile", GRIP_URL=None
)
def test_events_that_no_consumer_handles_are_neither_held_nor_missed(
    database: Database, handled: Handled
) -> None:
    """Unreliable events, probes of the doctor, and events of reserved channels."""
    registered(database, recorder("everything"))
    unhandled = ["volatile", "pg_eventstream:doctor"]
    for channel in unhandled:
        send_event(channel, "message", 1) if channel == "volatile" else database.send(channel)
    database.execute("SELECT pg_eventstream_sequence()")
    make_older(database, 120)
    assert prune(database) == 2  # long before the retention
    # Where no pruner has run for a long time, these are pruned with the others.
    send_event("volatile", "message", 2)
    database.send("pg_eventstream:permission", '{"user": "1", "channel": "a"}')
    database.execute("SELECT pg_eventstream_sequence()")
    make_older(database, WEEK.total_seconds() + 60)
    assert prune(database) == 2
    assert lost(database) == {}


def test_proxies_hold_events_that_consumers_do_not(database: Database, handled: Handled) -> None:
    registered(database, recorder("stock"))
    send(database, "a", 1)
    make_older(database, WEEK.total_seconds() + 60)
    with override_settings(GRIP_URL="http://127.0.0.1:1"):
        assert prune(database) == 0
    assert lost(database) == {}
    assert prune(database) == 1


def test_command_prunes_in_the_same_way(database: Database, handled: Handled) -> None:
    stock = recorder("stock")
    registered(database, stock)
    send(database, "a", 2500)
    make_older(database, 2 * DAY.total_seconds())
    for expected in (0, 2500):
        output = StringIO()
        call_command("eventstream_prune", stdout=output)
        assert output.getvalue().strip() == f"{expected} events pruned."
        make_older(database, WEEK.total_seconds())
    assert lost(database) == {("stock", slot_of("a")): 2500}


def test_events_in_any_order_of_age_are_kept_or_told(database: Database, handled: Handled) -> None:
    """As after the clock was set back."""
    stock = recorder("stock")
    registered(database, stock)
    for channel in "abcab":
        send(database, channel, 1)
    age(database, events_of="b", by=8 * DAY)
    assert prune(database) == 2
    assert lost(database) == {("stock", slot_of("b")): 5}
    assert kept(database) == 3
    with pytest.raises(ConsumerMissedEvents):
        stock.drain()


def test_busy_handler_neither_stops_the_pruner_nor_hides_what_it_prunes(
    database: Database, handled: Handled
) -> None:
    registered(database, recorder("stock"))
    send(database, "a", 1)
    make_older(database, WEEK.total_seconds() + 60)
    with database.connect(autocommit=False) as handler:
        handler.execute("UPDATE pg_eventstream_slot SET attempts = 0")
        assert prune(database) == 0
        handler.rollback()
    assert prune(database) == 1
    assert lost(database) == {("stock", slot_of("a")): 1}


def test_event_that_is_pruned_while_it_is_to_be_parked_is_not_skipped(
    database: Database, handled: Handled
) -> None:
    """With one attempt, it is parked at once, from the stream."""

    @consumer("stock", channels=["a"], start="earliest", retry=Retry(1))
    def fail(event: ConsumedEvent) -> None:
        make_older(database, WEEK.total_seconds() + 60)
        assert prune(database) == 1
        raise ValueError("no")

    registered(database, fail)
    send(database, "a", 1)
    run(database, fail)
    assert database.fetch("SELECT FROM pg_eventstream_parked") == []
    [(stopped, error)] = database.fetch(
        "SELECT stopped, error FROM pg_eventstream_slot WHERE slot = %s", [slot_of("a")]
    )
    assert stopped
    assert "pruned" in error


def test_large_event_that_is_pruned_before_it_is_read_is_not_skipped(
    database: Database, handled: Handled
) -> None:
    """Data of large events are read when they are handled."""
    done: list[int] = []

    @consumer("stock", channels=["a"], start="earliest", retry=Retry(1))
    def handle(event: ConsumedEvent) -> None:
        done.append(event.eid)
        make_older(database, WEEK.total_seconds() + 60)
        prune(database)

    registered(database, handle)
    send_events([("a", "message", "x" * 100_000) for _ in range(3)])
    database.execute("SELECT pg_eventstream_sequence()")
    run(database, handle)
    assert done == [1]
    assert database.fetch("SELECT FROM pg_eventstream_parked") == []
    assert (
        database.value(
            "SELECT position FROM pg_eventstream_checkpoint WHERE slot = %s", [slot_of("a")]
        )
        == 1
    )
    assert database.value("SELECT stopped FROM pg_eventstream_slot WHERE slot = %s", [slot_of("a")])


@pytest.mark.parametrize("way", ["once", "drain"])
def test_consumer_that_only_cron_runs_holds_nothing_that_it_does_not_follow(
    database: Database, handled: Handled, way: str
) -> None:
    stock = recorder("stock", channels=["a"])
    registered(database, stock)
    send(database, "a", 1)
    send(database, "b", 1200)
    for _ in range(2):  # the second time it has nothing to handle
        if way == "drain":
            stock.drain()
        else:
            Worker([stock], "default").run_once()
        make_older(database, 2 * DAY.total_seconds())
        send(database, "b", 1)
        assert prune(database) in (1201, 1)
        assert kept(database) == 1
    assert handled.count("stock") == 1


@pytest.mark.faults
def test_consumer_that_begins_with_the_earliest_beside_a_pruner_misses_nothing(
    database: Database, handled: Handled
) -> None:
    """Each registers while events are pruned, and later handles an unbroken rest."""
    events, rounds, milliseconds = (30_000, 50, 4) if THOROUGH else (1000, 3, 20)
    begun: set[int] = set()

    def least() -> int:
        return int(database.value("SELECT min(position) FROM pg_eventstream_stream"))

    send(database, "a", events)
    database.execute(
        "UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 day'"
        " + position * make_interval(secs => %s / 1000.0)",
        [milliseconds],
    )
    with pruning(database):
        for n in range(rounds):
            if n > 2 and least() > 0.9 * events:
                break  # on a slow machine
            # More is due than when the last one began.
            wait_until(lambda: least() > max(begun, default=0), timeout=60)
            before = least()
            late = recorder(f"late{n}", channels=["a"], batch=1000)
            registered(database, late)
            if n % 2:
                Worker([late], "default").run_once()
            else:
                late.drain()
            eids = handled.eids(f"late{n}")["a"]
            assert eids == list(range(eids[0], events + 1))
            assert before <= eids[0]
            begun.add(eids[0])
    assert len(begun) > 2
    assert lost(database) == {}


class Sent:
    """All events that were sent, in the order of their positions, and what must become of them."""

    def __init__(self, database: Database, handled: Handled) -> None:
        self._database = database
        self._handled = handled
        self.channels: list[str] = []

    def send(self, *channels: str) -> None:
        send_events([(channel, "message", n) for n, channel in enumerate(channels)])
        self._database.execute("SELECT pg_eventstream_sequence()")
        self.channels += channels

    def check(self, name: str, begin: int = 0) -> int:
        """Nothing is skipped up to the checkpoints, and nothing is missed but what is not handled.

        Returns the number of slots that miss events.
        """
        rows = self._database.fetch(
            "SELECT c.slot, c.position, s.lost FROM pg_eventstream_checkpoint AS c"
            "  JOIN pg_eventstream_slot AS s USING (consumer_id, slot)"
            "  JOIN pg_eventstream_consumer AS k ON k.id = c.consumer_id WHERE name = %s",
            [name],
        )
        checkpoint = {slot: position for slot, position, _ in rows}
        missed = {slot: lost for slot, position, lost in rows if lost and lost > position}
        expected: dict[str, list[int]] = {}
        eids: dict[str, int] = {}
        for position, channel in enumerate(self.channels, start=1):
            eids[channel] = eid = eids.get(channel, 0) + 1
            slot = slot_of(channel)
            if begin < position <= checkpoint[slot]:
                expected.setdefault(channel, []).append(eid)
            elif position > begin:
                assert slot in missed, f"{channel}:{eid} is missing unnoticed"
        assert self._handled.eids(name) == expected
        for slot, lost in missed.items():
            assert slot_of(self.channels[lost - 1]) == slot
        return len(missed)


@contextmanager
def pruning(database: Database) -> Iterator[None]:
    """Prune all the time."""
    over = threading.Event()

    def prune_until_it_is_over() -> None:
        with database.connect() as session:
            while not over.wait(0.002):
                Pruner(session).run_once()

    thread = threading.Thread(target=prune_until_it_is_over)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_handling_beside_pruning_never_skips_and_never_gives_a_false_alarm(
    database: Database, handled: Handled
) -> None:
    """The hold ends at about the moment at which the events are handled, many times."""
    chance = seeded()
    sent, told, missed = Sent(database, handled), 0, 0
    hold, rounds = 0.05, 300 if THOROUGH else 12
    for n in range(rounds):
        name, begin = f"all{n}", len(sent.channels)
        late = recorder(name, start="latest", batch=chance.choice([1, 3]))
        registered(database, late)
        with (
            override_settings(EVENTSTREAM_RETENTION=1e-6, EVENTSTREAM_CONSUMER_HOLD=hold),
            pruning(database),
        ):
            sent.send(*chance.choices("abcd", k=6))
            time.sleep(chance.uniform(0, 0.05))
            try:
                late.drain()
            except ConsumerMissedEvents:
                told += 1
                hold *= 1.5
            else:
                assert sent.check(name, begin) == 0
                hold = max(hold / 1.5, 0.001)
            missed += bool(sent.check(name, begin))
        database.execute(
            "DELETE FROM pg_eventstream_checkpoint; DELETE FROM pg_eventstream_slot;"
            " DELETE FROM pg_eventstream_consumer"
        )
    assert told == missed
    assert 0 < told < rounds


@pytest.mark.parametrize(
    "killed", [True, pytest.param(False, marks=[pytest.mark.faults, pytest.mark.thorough])]
)
def test_processes_beside_a_pruner_are_told_what_they_miss(
    database: Database, handled: Handled, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    sent = Sent(database, handled)
    settings = {"EVENTSTREAM_RETENTION": 1e-6, "EVENTSTREAM_CONSUMER_HOLD": 0.5}
    environment = declared({"name": "all", "handler": "record", "start": "earliest", "batch": 2})
    registered(database, recorder("all"))
    channels = [f"c{n}" for n in range(30)]

    def is_over() -> bool:
        last = len(sent.channels)
        return not database.fetch(
            "SELECT FROM pg_eventstream_checkpoint JOIN pg_eventstream_slot"
            " USING (consumer_id, slot) WHERE position < %s AND NOT stopped",
            [last],
        )

    with settings_everywhere(monkeypatch, **settings), pruning(database):
        process = ConsumerProcess("--processes", "2", environment=environment).begin()
        for _ in range(20):
            sent.send(*channels)
        process.kill() if killed else process.stop(timeout=30)
        sent.send(*channels[:10])
        wait_until(lambda: kept(database) == 0, timeout=30)
        # Some slots miss events, and stop; the others continue.
        with ConsumerProcess(environment=environment):
            sent.send(*channels)
            wait_until(is_over, timeout=30)
    assert sent.check("all")
    assert all(
        "were pruned" in error
        for (error,) in database.fetch("SELECT error FROM pg_eventstream_slot WHERE stopped")
    )


def test_role_that_may_not_see_consumers_prunes_nothing_that_they_could_lack(
    database: Database,
    handled: Handled,
    control: ControlPort,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after the migration, before grants.sql is repeated: the rest of the work is done."""
    monkeypatch.setattr(pruner, "_is_unseen_due", Rarely())
    role = granted(database, "publisher")
    database.execute(
        f"REVOKE ALL ON pg_eventstream_consumer, pg_eventstream_checkpoint FROM {role};"
        f"REVOKE ALL (consumer_id, slot, lost) ON pg_eventstream_slot FROM {role}"
    )
    publisher = Publisher(Connector("default", as_role(database, role)))

    def publish(channel: str) -> int:
        send_event(channel, "message", 1)
        assert publisher.run_once() == 1
        age(database, events_of=channel, by=8 * DAY)
        assert publisher.run_once() == 0
        return kept(database)

    assert publish("a") == 0  # where there is no consumer, there is nothing to see
    registered(database, recorder("stock", start="latest"))
    for n in range(1, 3):
        assert publish(f"b{n}") == n
    said = [r for r in caplog.records if getattr(r, "event", "") == "may-not-see-consumers"]
    [message] = {record.getMessage() for record in said}
    assert len(said) == 1
    assert f"psql -v publisher={role}" in message
    assert "/grants.sql" in message
    granted(database, "publisher")
    publisher.run_once()
    assert kept(database) == 0
    assert len(lost(database)) == 2
