"""When an event was committed is written at its COMMIT, and stays with it."""

from __future__ import annotations

from datetime import datetime

from tests.support.database import Database


def committed(database: Database) -> list[datetime | None]:
    rows = database.fetch("SELECT committed_at FROM pg_eventstream_stream ORDER BY position")
    return [at for (at,) in rows]


def test_time_of_commit_is_that_of_the_commit_and_not_of_the_insert(database: Database) -> None:
    with database.connect(autocommit=False) as sender:
        sender.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', '1')")
        before = database.value("SELECT clock_timestamp()")
        sender.commit()
        after = database.value("SELECT clock_timestamp()")
    database.execute("SELECT pg_eventstream_sequence()")
    [committed_at] = committed(database)
    assert committed_at is not None
    assert before <= committed_at <= after
    assert database.value("SELECT created FROM pg_eventstream_event") <= before


def test_row_of_an_outbox_without_the_time_is_sequenced_like_any_other(database: Database) -> None:
    """A row that the trigger wrote before the migration."""
    with database.connect(autocommit=False) as sender:
        sender.execute("SET CONSTRAINTS ALL IMMEDIATE")
        sender.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', '1')")
        sender.execute("UPDATE pg_eventstream_outbox SET committed_at = NULL")
        sender.commit()
    database.execute("SELECT pg_eventstream_sequence()")
    assert committed(database) == [None]


def test_slices_keep_the_times(database: Database) -> None:
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data)"
        " SELECT 'a', n::text FROM generate_series(1, 60000) AS n"
    )
    while database.value("SELECT pg_eventstream_sequence()"):
        pass
    times = [at for at in committed(database) if at is not None]
    assert len(times) == 60000
    assert times == sorted(times)
