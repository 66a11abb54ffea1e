"""Clients see events in the order of commits, independent of the order of the INSERTs."""

from __future__ import annotations

import pytest

from tests.support.database import Database
from tests.support.snapshots import only_hold_a_snapshot


@pytest.mark.parametrize("immediate", [False, True])
def test_transaction_that_sequences_before_its_commit_loses_nothing(
    database: Database, immediate: bool
) -> None:
    """Its own events come after those that were committed when it made the call."""
    database.value("SELECT pg_eventstream_sequence()")
    with database.connect(autocommit=False) as connection:
        if immediate:
            connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        for own in ("own", "own too"):
            connection.execute(
                "INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', %s)", [own]
            )
            database.send("a", f"before {own}")
            assert connection.execute("SELECT pg_eventstream_sequence()").fetchone() == (1,)
        connection.commit()
    database.send("a", "after")
    assert database.value("SELECT pg_eventstream_sequence()") == 3
    assert database.value("SELECT pg_eventstream_sequence()") == 0
    rows = database.fetch(
        "SELECT eid, data FROM pg_eventstream_stream AS s"
        " JOIN pg_eventstream_event AS e ON e.id = s.event_id ORDER BY position"
    )
    assert rows == list(enumerate(["before own", "before own too", "own", "own too", "after"], 1))


def test_held_snapshot_makes_no_call_walk_over_what_is_dead(database: Database) -> None:
    """Vacuum can remove nothing in the meantime, but a call reads no more than before."""
    with database.connect(autocommit=False) as held, database.connect() as connection:

        def pages_read(events: int) -> int:
            connection.execute(
                "INSERT INTO pg_eventstream_event (channel, data)"
                " SELECT 'a', n FROM generate_series(1, %s) AS n",
                [events],
            )
            row = connection.execute(
                "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT pg_eventstream_sequence()"
            ).fetchone()
            assert row
            plan = row[0][0]["Plan"]
            return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])

        only_hold_a_snapshot(held, "")
        pages_read(1)
        before = pages_read(1)
        for _ in range(3):
            pages_read(10_000)
            connection.execute("DELETE FROM pg_eventstream_outbox")  # as the pruner does
        assert pages_read(1) < before + 50
