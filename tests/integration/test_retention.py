"""Events past the retention are pruned, and only these."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.test import AsyncClient, override_settings

from pg_eventstream import get_events, send_event, send_events, subscribe
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.postgres.locks import LOCK_SPACE, PRUNE_LOCK
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.publisher.pruner import Pruner
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.rounds import publish_once
from tests.support.stored import DAY, age, data


@pytest.fixture
def control() -> Iterator[ControlPort]:
    with ControlPort() as port, override_settings(GRIP_URL=port.url):
        yield port


def prune() -> str:
    output = StringIO()
    call_command("eventstream_prune", stdout=output)
    return output.getvalue().strip()


def test_events_past_the_retention_are_pruned(database: Database, control: ControlPort) -> None:
    send_events([("old", "message", n) for n in range(2500)])
    publish_once()
    age(database, events_of="old", by=DAY + timedelta(seconds=1))
    send_event("young", "message", "young")
    publish_once()
    # publish_once() prunes as well
    assert data(database) == ['"young"']
    assert prune() == "0 events pruned."
    age(database, events_of="young", by=DAY - timedelta(minutes=1))
    assert prune() == "0 events pruned."
    age(database, events_of="young", by=timedelta(minutes=2))
    assert prune() == "1 events pruned."
    assert data(database) == []
    assert database.value("SELECT count(*) FROM pg_eventstream_stream") == 0


def test_retention_is_a_setting(database: Database, control: ControlPort) -> None:
    send_event("a", "message", 1)
    publish_once()
    age(database, events_of="a", by=timedelta(minutes=10))
    with override_settings(EVENTSTREAM_RETENTION=timedelta(minutes=11)):
        assert prune() == "0 events pruned."
    with override_settings(EVENTSTREAM_RETENTION=9 * 60):
        assert prune() == "1 events pruned."


def test_retention_of_none_keeps_all_events_but_unreliable_ones(
    database: Database, control: ControlPort
) -> None:
    sent = ["first", "second", "third"]
    with override_settings(
        EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Volatile",
        EVENTSTREAM_RETENTION=None,
    ):
        send_events([("a", "message", text) for text in sent])
        send_event("volatile", "message", "gone soon")
        publish_once()
        with database.connect() as connection:
            connection.execute("SET session_replication_role = replica")  # no trigger fires
            connection.execute(
                "INSERT INTO pg_eventstream_event (channel, data, created)"
                " VALUES ('a', 'unseen', '2000-01-01')"
            )
        age(database, events_of="a", by=3650 * DAY)
        age(database, events_of="volatile", by=timedelta(minutes=2))
        for pruned in (1, 0):
            assert prune() == f"{pruned} events pruned."
            assert publish_once() == 0
        assert [event.json() for event in get_events(["a"], "a:0").events] == sent
        assert database.value("SELECT count(*) FROM pg_eventstream_outbox") == 0
        with database.connect() as connection:
            sweep = Pruner(connection)
            assert sweep.run_once() == 0
            with override_settings(EVENTSTREAM_RETENTION=timedelta(days=365_000)):  # the maximum
                assert sweep.run_once() == 0
            with override_settings(EVENTSTREAM_RETENTION=DAY):
                assert sweep.run_once() == 4
    assert data(database) == []


@pytest.mark.parametrize("value", [0, -3600, "24h", 1e-9, timedelta.max])
def test_retention_that_makes_no_sense_prunes_nothing_and_says_what_is_wrong(
    database: Database, control: ControlPort, value: object
) -> None:
    send_event("a", "message", 1)
    publish_once()
    age(database, events_of="a", by=timedelta(hours=1))
    with (
        override_settings(EVENTSTREAM_RETENTION=value),
        pytest.raises(CommandError, match="EVENTSTREAM_RETENTION must be a timedelta or"),
    ):
        prune()  # as in a program: the command line runs the checks first
    assert len(data(database)) == 1


@pytest.mark.parametrize(
    "setting", [{"EVENTSTREAM_RETENTION": 0}, {"EVENTSTREAM_SAFETY_POLL": float("nan")}]
)
def test_number_that_makes_no_sense_lets_no_publisher_and_no_stream_begin(
    database: Database, setting: dict[str, object]
) -> None:
    async def follow() -> None:
        await anext(aiter(subscribe(["a"], "earliest")))

    (name,) = setting
    with override_settings(**setting):
        with pytest.raises(ImproperlyConfigured, match=name):
            Publisher(Connector("default"))
        with pytest.raises(ImproperlyConfigured, match=name):
            asyncio.run(AsyncClient().get("/events/?channel=a"))
        with pytest.raises(ImproperlyConfigured, match=name):
            asyncio.run(follow())


def test_event_that_no_proxy_has_acknowledged_is_kept(
    database: Database, control: ControlPort
) -> None:
    send_event("a", "message", "published")
    publish_once()
    send_event("a", "message", "sequenced")
    database.execute("SELECT pg_eventstream_sequence()")
    send_event("a", "message", "committed")
    age(database, events_of="a", by=2 * DAY)
    assert prune() == "1 events pruned."
    assert data(database) == ['"sequenced"', '"committed"']
    publish_once()
    assert control.ids == ["1", "2", "3"]


def test_without_proxies_age_alone_decides(database: Database) -> None:
    send_event("a", "message", "sequenced")
    database.execute("SELECT pg_eventstream_sequence()")
    send_event("a", "message", "committed")
    age(database, events_of="a", by=2 * DAY)
    assert prune() == "1 events pruned."
    assert data(database) == ['"committed"']


def test_idle_channel_continues_counting_after_all_its_events_are_pruned(
    database: Database, control: ControlPort
) -> None:
    send_events([("a", "message", n) for n in range(3)])
    publish_once()
    age(database, events_of="a", by=2 * DAY)
    assert prune() == "3 events pruned."
    send_event("a", "message", "after")
    publish_once()
    assert control.items[-1]["id"] == "4"
    assert database.fetch("SELECT name, pruned FROM pg_eventstream_channel") == [("a", 3)]


def test_pruning_ends_although_events_are_sequenced_in_the_meantime(database: Database) -> None:
    class Busy(Pruner):
        rounds = 0

        def _prune_outbox(self) -> int:
            self.rounds += 1
            assert self.rounds < 10, "it does not end"
            database.send("a")
            database.execute("SELECT pg_eventstream_sequence()")
            return super()._prune_outbox()

    with database.connect() as connection:
        assert Busy(connection).run_once() == 0


def test_outbox_is_emptied_as_soon_as_its_transactions_are_sequenced(
    database: Database, control: ControlPort
) -> None:
    publish_once()  # the first call compares no snapshots
    send_events([("a", "message", n) for n in range(2500)])
    with database.connect(autocommit=False) as connection:
        connection.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', 'late')")
        send_event("a", "message", "after it")
        publish_once()
        connection.commit()
    # The open transaction is older than the last event, whose row is therefore still needed.
    assert database.value("SELECT count(*) FROM pg_eventstream_outbox") == 2
    assert publish_once() == 1
    assert database.value("SELECT count(*) FROM pg_eventstream_outbox") == 0
    events = [eid for eid in control.ids if eid]  # without the hints after every so many
    assert len(events) == len(set(events)) == 2502


def test_sweep_stands_in_no_senders_way(database: Database, control: ControlPort) -> None:
    send_events([("a", "message", n) for n in range(5)])
    publish_once()
    age(database, events_of="a", by=2 * DAY)
    with database.connect(autocommit=False) as sweeper:
        sweeper.execute(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {PRUNE_LOCK})")
        sweeper.execute("DELETE FROM pg_eventstream_stream")
        sweeper.execute("DELETE FROM pg_eventstream_event")
        with database.connect() as sender:
            sender.execute("SET lock_timeout = '1s'")
            sender.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', '1')")
            assert sender.execute("SELECT pg_eventstream_sequence()").fetchone() == (1,)
        sweeper.rollback()


def test_prune_of_an_unknown_database_is_explained(database: Database) -> None:
    with pytest.raises(CommandError, match="database 'nowhere' is not in DATABASES"):
        call_command("eventstream_prune", database="nowhere")


def test_one_sweep_finds_what_becomes_visible_late(
    database: Database, control: ControlPort
) -> None:
    publish_once()
    with (
        database.connect() as connection,
        database.connect(autocommit=False) as late,
        override_settings(EVENTSTREAM_RETENTION=1e-6, GRIP_URL=None),
    ):
        sweep = Pruner(connection)
        late.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', 'late')")
        for _ in range(2):  # with higher transaction ids, and pruned before
            send_event("a", "message", "before")
            database.execute("SELECT pg_eventstream_sequence()")
            assert sweep.run_once() == 1
        late.commit()
        database.execute("SELECT pg_eventstream_sequence()")
        assert sweep.run_once() == 1
    assert data(database) == []
    assert database.value("SELECT count(*) FROM pg_eventstream_stream") == 0
    assert database.value("SELECT count(*) FROM pg_eventstream_outbox") == 0


def test_young_event_in_front_holds_nothing_else_up_and_is_pruned_in_its_time(
    database: Database,
) -> None:
    send_events([("young", "message", 1), ("old", "message", 2), ("old", "message", 3)])
    database.execute("SELECT pg_eventstream_sequence()")
    age(database, events_of="old", by=2 * DAY)
    with database.connect() as connection:
        sweep = Pruner(connection)
        assert sweep.run_once() == 2
        age(database, events_of="young", by=2 * DAY)
        assert sweep.run_once() == 1


@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_of_a_channel_is_known_exactly(database: Database, seed: int) -> None:
    """Events become due in any order: what is kept after the pruned ones is complete."""
    chance = random.Random(seed)
    events = 1500 if seed == 0 else 12
    send_events([(chance.choice("ab"), "message", n) for n in range(events)])
    database.execute("SELECT pg_eventstream_sequence()")
    everything: list[tuple[str, int]] = database.fetch(
        "SELECT channel, eid FROM pg_eventstream_stream ORDER BY position"
    )
    kept = list(everything)
    with database.connect() as connection, override_settings(GRIP_URL=None):
        sweep = Pruner(connection)
        while kept:
            # Mostly the oldest; sometimes the clock was wrong.
            due = kept[: chance.randrange(1, 1 + len(kept))]
            if chance.random() < 0.5:
                due = chance.sample(due, chance.randrange(1, 1 + len(due)))
            connection.execute(
                "UPDATE pg_eventstream_stream SET sequenced_at = '2000-01-01' WHERE (channel, eid)"
                " IN (SELECT * FROM unnest(%s::text[], %s::bigint[]))",
                [[channel for channel, _ in due], [eid for _, eid in due]],
            )
            sweep._forget()
            assert sweep.run_once() == len(due)
            kept = [event for event in kept if event not in due]
            for channel in "ab":
                of = [eid for name, eid in everything if name == channel]
                left = {eid for name, eid in kept if name == channel}
                gone = max((eid for eid in of if eid not in left), default=0)
                page = get_events([channel], "earliest", limit=500)
                assert page.reset == []
                assert [event.eid for event in page.events] == list(range(gone + 1, len(of) + 1))[
                    :500
                ]
                for eid in (gone - 1, gone, gone + 1, len(of), len(of) + 1):
                    if eid >= 0:
                        page = get_events([channel], f"{channel}:{eid}")
                        assert (page.reset == []) == (gone <= eid <= len(of)), (channel, eid)
    send_events([("a", "message", "next"), ("b", "message", "next")])
    database.execute("SELECT pg_eventstream_sequence()")
    assert sorted(database.fetch("SELECT channel, eid FROM pg_eventstream_stream")) == [
        (channel, 1 + sum(name == channel for name, _ in everything)) for channel in "ab"
    ]


def test_busy_channel_costs_the_pruner_no_separate_write(database: Database) -> None:
    send_events([("a", "message", n) for n in range(20)])
    database.execute("SELECT pg_eventstream_sequence()")
    age(database, events_of="a", by=2 * DAY)
    send_event("a", "message", "stays")
    database.execute("SELECT pg_eventstream_sequence()")
    with override_settings(GRIP_URL=None):
        assert prune() == "20 events pruned."
    assert database.value("SELECT count(*) FROM pg_eventstream_channel") == 0
    assert get_events(["a"], "a:19").reset == ["a"]
    assert get_events(["a"], "a:20").events[0].json() == "stays"


def test_pruner_leaves_events_that_become_due_in_the_meantime_to_the_next_run(
    database: Database,
) -> None:
    send_events([("a", "message", n) for n in range(20_000)])
    database.execute("SELECT pg_eventstream_sequence()")
    database.execute(
        "UPDATE pg_eventstream_stream"
        " SET sequenced_at = statement_timestamp() + (position - 1000) * interval '0.2 ms'"
    )
    with (
        database.connect() as connection,
        override_settings(EVENTSTREAM_RETENTION=1e-6, GRIP_URL=None),
    ):
        sweep = Pruner(connection)
        assert 1000 <= sweep.run_once() < 20_000


def test_batch_does_not_walk_over_what_was_pruned_below_a_held_snapshot(
    database: Database,
) -> None:
    send_events([("a", "message", n) for n in range(30_000)])
    database.execute("SELECT pg_eventstream_sequence()")
    age(database, events_of="a", by=2 * DAY)
    with database.connect(autocommit=False) as holder, database.connect() as connection:
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT 1")
        if connection.info.server_version < 150000:
            pytest.skip("PostgreSQL 14 has no pg_stat_force_next_flush()")
        sweep = Pruner(connection)

        def pages_read() -> int:
            """The pages of the stream's indexes that all sessions have read so far."""
            connection.execute("SELECT pg_stat_force_next_flush(), pg_stat_clear_snapshot()")
            count: int = database.value(
                "SELECT idx_blks_hit + idx_blks_read FROM pg_statio_all_tables"
                " WHERE relname = 'pg_eventstream_stream'"
            )
            return count

        assert sweep.run_once() == 30_000
        before = pages_read()
        assert sweep.run_once() == 0
        assert pages_read() - before < 50
