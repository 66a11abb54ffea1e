"""How far consumers are behind, counted as they themselves would find it."""

from __future__ import annotations

import random

import pytest
from django.test import override_settings

from pg_eventstream import send_event, send_events
from pg_eventstream.consumers import consumer, declare
from pg_eventstream.consumers.progress import ConsumerState, read_consumers
from pg_eventstream.limits import Limits
from pg_eventstream.postgres.slots import slot_of
from pg_eventstream.servers.processes import wait_until
from tests.support.consumers import (
    ConsumerProcess,
    Handled,
    declared,
    recorder,
    running_worker,
)
from tests.support.database import Database
from tests.support.handlers import named, obey

SEQUENCE = "SELECT pg_eventstream_sequence()"


def read(database: Database, **options: int) -> dict[str, ConsumerState]:
    with database.connect() as connection:
        found = read_consumers(connection, declare._declared, **options)
    assert found is not None
    return {state.name: state for state in found}


def lag(database: Database, name: str) -> tuple[int | None, bool]:
    state = read(database)[name]
    return state.lag_events, state.lag_is_estimate


def test_consumer_that_has_handled_everything_has_no_lag(
    database: Database, handled: Handled
) -> None:
    send_events([("a", "message", n) for n in range(30)])
    stock = recorder("stock", channels=["a"])
    assert stock.drain() == 30
    send_event("b", "message", 1)  # not for it
    database.send("pg_eventstream:permission")
    for _ in range(2):
        state = read(database)["stock"]
        assert (state.lag_events, state.lag_is_estimate) == (0, False)
        assert (state.lag_seconds, state.free_lag_seconds) == (0, 0)
        database.execute(SEQUENCE)
    assert state.declared
    assert (state.holders, state.heartbeat_seconds, len(state.unheld_slots)) == ([], None, 16)
    recorder("new", channels=["n"])
    del declare._declared["stock"]
    found = read(database)
    assert found["stock"].declared is False
    new = found["new"]
    assert (new.registered, new.declared, new.lag_events) == (False, True, None)
    assert (new.channels, new.declared_at) == (["n"], "tests.support.handlers.record.new")


def test_lag_is_what_the_consumer_then_handles(database: Database, handled: Handled) -> None:
    """For any filters, whether events are in order or not, and wherever the slots are."""
    chance = random.Random(3)
    consumers = [
        recorder("all"),
        recorder("named", channels=["c1", "c2", "c39"]),
        recorder("prefixed", prefixes=["c1", "d*"]),
        recorder("both", channels=["c0"], prefixes=["c3"]),
        recorder("none", channels=["nothing"]),
    ]
    channels = [*(f"c{n}" for n in range(40)), "d*e", "e"]
    for one in consumers:
        one.drain()
    with override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS=UNRELIABLE):
        for sequenced in (True, False):
            send_events([(chance.choice(channels), "m", n) for n in range(200)])
            database.send("pg_eventstream:x")
            if sequenced:
                database.execute(SEQUENCE)
            found = read(database)
            wanted = chance.sample(consumers, 2)
            assert {one.name: one.drain() for one in wanted} == {
                one.name: found[one.name].lag_events for one in wanted
            }
            found = read(database)
            assert [found[one.name].lag_events for one in wanted] == [0, 0]


UNRELIABLE = f"{__name__}.NotTheFifth"


class NotTheFifth:
    def is_channel_reliable(self, channel: str) -> bool:
        return channel != "c5"


def test_age_is_that_of_the_oldest_event_that_is_left(database: Database, handled: Handled) -> None:
    stock = recorder("stock", channels=["a", "b"])
    stock.drain()
    for n, channel in enumerate(["x", "a", "b", "x"]):
        send_event(channel, "message", n)
        database.execute(
            "UPDATE pg_eventstream_outbox SET committed_at = now() - make_interval(secs => %s)"
            " WHERE channel = %s",
            [(400, 300, 200)[n % 3], channel],
        )
    for _ in range(2):  # waiting to be put in order, and in order
        state = read(database)["stock"]
        assert state.lag_events == 2
        assert 300 <= (state.lag_seconds or 0) < 330
        database.execute(SEQUENCE)
    stock.drain()
    assert read(database)["stock"].lag_seconds == 0


MANY = (
    "INSERT INTO pg_eventstream_event (channel, data)"
    " SELECT CASE WHEN n %% %s = 0 THEN 'a' ELSE 'x' || n %% 100 END, ''"
    " FROM generate_series(1, %s) AS n"
)


def test_consumer_that_is_far_behind_gets_an_estimate(database: Database, handled: Handled) -> None:
    for name, options in {
        "all": {},
        "some": {"channels": ["a"]},
        "none": {"channels": ["q"]},
    }.items():
        recorder(name, **options).drain()
    for _ in range(2):
        database.execute(MANY, [10, 20_000])
        database.execute(SEQUENCE)
    states = read(database)
    assert (states["all"].lag_events, states["all"].unread_positions) == (40_000, 40_000)
    assert 3000 < (states["some"].lag_events or 0) < 5000
    assert states["some"].lag_is_estimate
    assert (states["some"].lag_seconds or 0) > 0
    # Nothing is near, and nothing that was looked up is for it.
    assert (states["none"].lag_events, states["none"].lag_seconds) == (0, None)
    assert states["none"].lag_is_estimate
    # What the pruner has reported is not read.
    pruned = read(database, pruned=39_000)
    assert (pruned["all"].lag_events, pruned["all"].lag_is_estimate) == (1000, False)
    assert (pruned["none"].lag_events, pruned["none"].lag_seconds) == (0, 0)


def test_slot_that_stopped_does_not_hide_how_far_the_others_are(
    database: Database, handled: Handled
) -> None:
    stopped = next(f"c{n}" for n in range(99) if slot_of(f"c{n}") != slot_of("a"))
    stock = consumer("stock", channels=["a", stopped], start="earliest")(named(obey, "stock"))
    send_event(stopped, "message", {"fail": "no"})
    with pytest.raises(ValueError, match="no"):
        stock.drain()
    database.execute(
        "UPDATE pg_eventstream_slot SET stopped = true, failing = 1, attempts = 3, error = 'no'"
        " WHERE slot = %s",
        [slot_of(stopped)],
    )
    database.execute(MANY, [7, 20_000])
    database.execute(SEQUENCE)
    database.execute(
        "UPDATE pg_eventstream_checkpoint SET position = 20001 WHERE slot <> %s", [slot_of(stopped)]
    )
    database.execute("UPDATE pg_eventstream_stream SET committed_at = now() - interval '1 h'")
    send_events([("a", "message", n) for n in range(3)])
    database.execute(SEQUENCE)
    state = read(database)["stock"]
    assert state.lag_events == 4
    assert (state.free_lag_seconds or 99) < 60
    assert (state.lag_seconds or 0) >= 3600
    assert [(s.slot, s.event, s.attempts, s.error, s.retry_seconds) for s in state.stopped] == [
        (slot_of(stopped), f"{stopped}:1", 3, "no", None)
    ]
    assert state.failing == []


def test_checkpoint_of_another_stream_counts_from_where_they_part(
    database: Database, handled: Handled
) -> None:
    stock = recorder("stock")
    send_events([("a", "message", n) for n in range(5)])
    stock.drain()
    database.execute("UPDATE pg_eventstream_cursor SET incarnation = 10^12, began = 2")
    assert lag(database, "stock") == (3, False)
    database.execute("UPDATE pg_eventstream_checkpoint SET position = 100, incarnation = 10^12")
    assert lag(database, "stock") == (0, False)


def test_parked_events_are_counted_and_what_was_lost_is_seen(
    database: Database, handled: Handled
) -> None:
    stock = recorder("stock")
    send_event("a", "message", 1)
    stock.drain()
    database.execute(
        "INSERT INTO pg_eventstream_parked (consumer_id, slot, position, channel, number, type,"
        " data, created, error, traceback, attempts)"
        " SELECT id, 1, n, 'a', n, '', '', now(), '', '', 5"
        "   FROM pg_eventstream_consumer, generate_series(1, 3) AS n"
    )
    database.execute("UPDATE pg_eventstream_slot SET lost = 0 WHERE slot = 1")
    assert (read(database)["stock"].parked, read(database)["stock"].lost) == (3, None)
    database.execute("UPDATE pg_eventstream_slot SET lost = 7, replay_to = 9 WHERE slot = 1")
    state = read(database)["stock"]
    assert (state.lost, state.replay_to) == (7, 9)


@pytest.mark.thorough
@pytest.mark.faults
def test_processes_and_their_slots_are_seen(database: Database, handled: Handled) -> None:
    environment = declared({"name": "all", "handler": "record", "start": "earliest"})
    send_event("a", "message", 1)
    with ConsumerProcess("--processes", "2", environment=environment):
        handled.wait("all", 1)
        state = read(database)["all"]
        assert state.processes == 2
        assert (state.heartbeat_seconds or 0) < 30
        names = [holder.name for holder in state.holders]
        assert 1 <= len({*names}) == len(names) <= 2
        held = [slot for holder in state.holders for slot in holder.slots]
        assert sorted(held + state.unheld_slots) == [*range(16)]
    state = read(database)["all"]
    assert (state.processes, state.holders, state.heartbeat_seconds) == (0, [], None)
    assert len(state.unheld_slots) == 16


def test_renamed_consumer_is_not_taken_for_a_new_one(database: Database, handled: Handled) -> None:
    recorder("stock").drain()
    database.execute(
        "UPDATE pg_eventstream_consumer SET name = 'store', former_names = array['stock']"
    )
    states = read(database)
    assert states["stock"].renamed_to == "store"
    assert states["store"].declared is False


def test_role_without_rights_and_database_without_tables_get_nothing(database: Database) -> None:
    with database.connect() as connection:
        assert read_consumers(connection, {}) == []
        connection.execute("DROP TABLE pg_eventstream_slot")
        assert read_consumers(connection, {}) is None


@pytest.mark.parametrize("safety_poll", [None, 3600])
def test_heart_of_a_consumer_that_has_nothing_to_do_beats(
    database: Database, handled: Handled, safety_poll: float | None
) -> None:
    idle = recorder("idle", channels=["none"])
    beats = "SELECT count(*) FROM pg_eventstream_slot WHERE heartbeat > now() - interval '1 h'"
    with (
        override_settings(EVENTSTREAM_SAFETY_POLL=safety_poll),
        running_worker(idle, limits=Limits(heartbeat=0.05)),
    ):
        wait_until(lambda: database.value(beats) == 16, timeout=20)
        for _ in range(3):
            database.execute("UPDATE pg_eventstream_slot SET heartbeat = now() - interval '1 day'")
            wait_until(lambda: database.value(beats) == 16, timeout=20)
