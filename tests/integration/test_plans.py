"""Statements that run all day find their rows by an index, for any statistics.

Each is explained while it runs (auto_explain), on tables of 100,000 rows without statistics, as
after a burst; and once more without its index, to show that the test would fail.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import psycopg
import pytest
from django.db import connection as django_connection
from django.test import override_settings

from pg_eventstream.consumers import Consumer, checkpoints, consumer, declare, reader
from pg_eventstream.consumers.checkpoints import Move
from pg_eventstream.grip.proxy import Proxy
from pg_eventstream.limits import LIMITS
from pg_eventstream.operate import state
from pg_eventstream.postgres import connector
from pg_eventstream.postgres.slots import SLOTS
from pg_eventstream.postgres.watchdog import WatchedConnection
from pg_eventstream.publisher import feed
from pg_eventstream.publisher import pruner as retention
from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.streams import hub, replay
from tests.support.database import Database, new_database
from tests.support.stored_consumer import CONSUMER

EVENTS, CHANNELS = 100_000, 100
NEWEST = EVENTS // CHANNELS


class Explained:
    """The plans of all statements that a session runs from now on."""

    def __init__(self, session: psycopg.Connection[Any]) -> None:
        self.plans: list[str] = []
        session.add_notice_handler(lambda notice: self.plans.append(notice.message_primary or ""))
        session.execute(
            """
            LOAD 'auto_explain';
            SET auto_explain.log_min_duration = 0;
            SET auto_explain.log_analyze = on;
            SET auto_explain.log_timing = off;
            SET auto_explain.log_nested_statements = on;
            SET auto_explain.log_level = notice;
            """
        )
        self.plans.clear()

    def check(self, *, index: str, rows: int) -> None:
        """Assert that the plans use the index, and that none reads a whole table or many rows.

        Nor is any of them compiled.
        """
        lines = "\n".join(plan for plan in self.plans if "plan:" in plan).split("\n")
        text = "\n".join(line for line in lines if "(never executed)" not in line)
        assert re.search(rf"using {index}\b|Scan on {index}\b", text), text
        for table in ("event", "stream", "outbox", "checkpoint"):
            assert f"Seq Scan on pg_eventstream_{table}" not in text, text
        for found in re.finditer(r"actual rows=([\d.]+) loops=(\d+)", text):
            assert float(found[1]) * int(found[2]) <= rows, text
        for found in re.finditer(r"Rows Removed by (?:Filter|Index Recheck): (\d+)", text):
            assert int(found[1]) <= rows, text
        # Compiling a statement takes longer than running it. (On versions that can.)
        assert "JIT:" not in text, text


def recover(database: Database) -> Explained:
    django_connection.ensure_connection()
    explain = Explained(django_connection.connection)
    missed = replay.replay({f"c{n}": NEWEST - 5 for n in range(10)})
    assert len(missed.events) == 50
    return explain


def read_for_proxy(database: Database) -> Explained:
    proxy = Proxy({"control_uri": "http://127.0.0.1:1"})
    reader = feed.Feed(proxy, connector.Connector("default"), threading.Event())
    reader._connect()
    assert reader._connection is not None
    explain = Explained(reader._connection)
    reader._position = EVENTS // 2
    reader._read_page()
    assert sum(len(batch.rows) for batch in reader._ready) == LIMITS.batch_items
    reader.close()
    return explain


def read_for_streams(database: Database) -> Explained:
    followed = hub.Hub("default")
    followed._followed.update(f"c{n}" for n in range(CHANNELS))
    reader = hub._Reader(followed)
    reader.position = EVENTS // 2
    with database.connect() as session:
        explain = Explained(session)
        assert reader._read_page(session) > 0
    return explain


def prune_old(database: Database) -> Explained:
    with database.connect() as session, override_settings(EVENTSTREAM_RETENTION=1e-6):
        sweep = retention.Pruner(session)
        assert sweep._prune_old(datetime.now(timezone.utc)) == 1000
        explain = Explained(session)
        assert sweep._prune_old(datetime.now(timezone.utc)) == 1000
    return explain


def register(database: Database, position: int) -> tuple[Consumer, int]:
    """A consumer of all channels that has handled so much, and its id."""
    everything = consumer("everything")(print)
    del declare._declared["everything"]
    with database.connect() as session:
        consumer_id = checkpoints.register(session, everything)
        session.execute("UPDATE pg_eventstream_checkpoint SET position = %s", [position])
    return everything, consumer_id


def read_for_consumer(database: Database) -> Explained:
    everything, consumer_id = register(database, 5000)
    with database.connect() as session:
        explain = Explained(session)
        page = reader.read_page(session, everything, consumer_id, 5000, range(SLOTS))
        assert len(page.rows) == reader.PAGE_EVENTS
    return explain


def move_checkpoints(database: Database) -> Explained:
    """The plans were made for a table of 16 rows, which has thousands of dead versions now."""
    _, consumer_id = register(database, 0)
    with database.connect() as session, database.connect(autocommit=False) as held:
        session.execute("VACUUM ANALYZE pg_eventstream_checkpoint")
        held.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        held.execute("SELECT FROM pg_eventstream_checkpoint")

        def move(place: int) -> None:
            moves = [Move(slot, 0, place, place + 1) for slot in range(SLOTS)]
            assert checkpoints.begin_locked(session, consumer_id, moves)
            assert checkpoints.move_locked(session, consumer_id, moves, 0)
            checkpoints.commit(session)
            assert checkpoints.begin_moving(
                session, consumer_id, [Move(0, 0, place + 1, place + 1)], 0
            )
            checkpoints.commit(session)

        for place in range(300):
            move(place)
        explain = Explained(session)
        move(300)
        session.execute("VACUUM ANALYZE pg_eventstream_checkpoint")
        move(301)
    return explain


def prune_what_is_handled(database: Database) -> Explained:
    register(database, 5000)
    return prune_old(database)


@override_settings(EVENTSTREAM_CONSUMER_HOLD=1e-6)
def prune_what_is_held_too_long(database: Database) -> Explained:
    register(database, 1000)
    return prune_old(database)


def find_channels(database: Database) -> Explained:
    with database.connect() as session:
        sweep = retention.Pruner(session)
        explain = Explained(session)
        assert len(sweep._channels_after("")) == CHANNELS
    return explain


def prune_outbox(database: Database) -> Explained:
    with database.connect() as session:
        explain = Explained(session)
        sweep = retention.Pruner(session)
        assert sweep._prune_outbox() == 1000
        assert sweep._prune_outbox() == 1000
    return explain


def look_for_unseen(database: Database) -> Explained:
    with database.connect() as session:
        explain = Explained(session)
        sweep = retention.Pruner(session)
        assert sweep._unseen.prune(datetime.now(timezone.utc)) is None
    return explain


def sequence(database: Database) -> Explained:
    database.send("c1")
    with database.connect() as session:
        explain = Explained(session)
        assert session.execute("SELECT pg_eventstream_sequence()").fetchone() == (1,)
    return explain


class ExplainedConnector(connector.Connector):
    explain: Explained

    def connect(self, role: str, *, patience: float = math.inf) -> WatchedConnection:
        session = super().connect(role, patience=patience)
        object.__setattr__(self, "explain", Explained(session))
        return session


def read_state(database: Database) -> Explained:
    explained = ExplainedConnector("default")
    assert state.read_state(explained).waiting.count == 0
    return explained.explain


def read_state_with_a_backlog(database: Database) -> Explained:
    database.execute("UPDATE pg_eventstream_cursor SET snapshot = '3:3:'")
    explained = ExplainedConnector("default")
    assert state.read_state(explained).waiting.count == state.MOST_COUNTED
    return explained.explain


def read_state_with_a_consumer_far_behind(database: Database) -> Explained:
    database.execute(CONSUMER)
    explained = ExplainedConnector("default")
    [consumer] = state.read_state(explained).consumers
    assert (consumer.lag_events, consumer.lag_is_estimate) == (EVENTS, True)
    return explained.explain


@pytest.fixture(scope="module")
def filled(postgres: Postgres) -> Iterator[Database]:
    """All events are sequenced, and are still in the outbox because it has not been pruned."""
    with new_database(postgres) as made:
        fill(made)
        yield made


def fill(database: Database) -> None:
    with database.connect() as admin:
        for table in ("event", "stream", "outbox"):
            admin.execute(f"ALTER TABLE pg_eventstream_{table} SET (autovacuum_enabled = off)")
        admin.execute("SET session_replication_role = replica")
        numbers = f"generate_series(1, {EVENTS}) AS n"
        admin.execute(
            "INSERT INTO pg_eventstream_event (id, channel, data)"
            f" SELECT n, 'c' || n % {CHANNELS}, 'data' FROM {numbers}"
        )
        admin.execute("SELECT setval('pg_eventstream_event_id_seq', %s)", [EVENTS])
        admin.execute(
            "INSERT INTO pg_eventstream_stream"
            " (position, channel, eid, event_id, sequenced_at)"
            f" SELECT n, 'c' || n % {CHANNELS}, (n - 1) / {CHANNELS} + 1, n,"
            f" now() - interval '2 minutes' FROM {numbers}"
        )
        admin.execute(
            "INSERT INTO pg_eventstream_outbox (xid, event_id, channel)"
            f" SELECT pg_current_xact_id(), n, 'c' || n % {CHANNELS} FROM {numbers}"
        )
        admin.execute(
            "INSERT INTO pg_eventstream_cursor (position, snapshot, cluster)"
            f" SELECT {EVENTS}, pg_current_snapshot(), system_identifier FROM pg_control_system()"
        )


@pytest.fixture
def full(postgres: Postgres, filled: Database) -> Iterator[Database]:
    with new_database(postgres, template=filled.name) as made:
        yield made


STREAM, EVENT, OUTBOX, CHECKPOINT = (
    f"pg_eventstream_{table}_pkey" for table in ("stream", "event", "outbox", "checkpoint")
)
EID = "pg_eventstream_stream_eid"
CASES = [
    (recover, EID, 600),
    (recover, EVENT, 600),
    (read_for_proxy, STREAM, 500),
    (read_for_proxy, EVENT, 500),
    (read_for_streams, STREAM, 1000),
    (read_for_streams, EVENT, 1000),
    (prune_old, STREAM, 1000),
    (prune_old, EVENT, 1000),
    (prune_what_is_handled, CHECKPOINT, 1000),
    (prune_what_is_held_too_long, CHECKPOINT, 1600),
    (prune_what_is_held_too_long, STREAM, 1600),
    (read_for_consumer, STREAM, 501),
    (read_for_consumer, EVENT, 501),
    (move_checkpoints, CHECKPOINT, SLOTS),
    (find_channels, EID, CHANNELS + 1),
    (prune_outbox, OUTBOX, 1000),
    (look_for_unseen, EVENT, 100),
    # Before PostgreSQL 18 the plan adds the rows of both ranges up.
    (read_state, STREAM, 5000),
    (read_state, EVENT, 5000),
    (read_state, OUTBOX, 5000),
    (read_state_with_a_backlog, OUTBOX, state.MOST_COUNTED),
    (read_state_with_a_consumer_far_behind, STREAM, 5000),
    (sequence, OUTBOX, 10),
    (sequence, EID, 10),
]


@pytest.mark.parametrize("work", dict.fromkeys(work for work, _, _ in CASES))
def test_statement_reads_by_its_index(
    full: Database, work: Callable[[Database], Explained]
) -> None:
    explained = work(full)
    for index, rows in [(index, rows) for one, index, rows in CASES if one is work]:
        explained.check(index=index, rows=rows)

    if work is read_state_with_a_consumer_far_behind:
        return  # without its index, it would read the table a thousand times
    # Without the index, this test would fail. (What the work has stored is removed.)
    django_connection.close()
    full.execute("TRUNCATE pg_eventstream_proxy, pg_eventstream_consumer CASCADE")
    table = re.sub("_(pkey|eid)$", "", index)
    full.execute(f"ALTER TABLE {table} DROP CONSTRAINT {index} CASCADE")
    with pytest.raises(AssertionError):
        work(full).check(index=index, rows=rows)
