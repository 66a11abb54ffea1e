"""A database moves to another cluster by pg_dump and pg_restore, including the publisher."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pg_eventstream.consumers import consumer, declare
from pg_eventstream.servers.postgres import Postgres
from tests.support.database import Database
from tests.support.dumped_data import as_default
from tests.support.dumped_database import dump, restore
from tests.support.environment import DIRECTORY


@pytest.fixture(scope="module")
def other_cluster() -> Iterator[Postgres]:
    with Postgres(DIRECTORY / "other-postgres") as server:
        yield server


def next_xid(database: Database) -> int:
    return int(database.value("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))


def advance_xid(database: Database, at_least: int) -> None:
    """Use up transaction ids, one transaction each."""
    database.execute(
        f"""
        DO $$ BEGIN
            WHILE pg_snapshot_xmax(pg_current_snapshot()) < '{at_least}' LOOP
                PERFORM pg_current_xact_id();
                COMMIT;
            END LOOP;
        END $$
        """
    )
    assert next_xid(database) >= at_least


def in_order(database: Database, channel: str) -> list[tuple[int, str]]:
    """What clients get of a channel: eids and data, in the order of the stream."""
    return database.fetch(
        """
        SELECT s.eid, e.data FROM pg_eventstream_stream s
          JOIN pg_eventstream_event e ON e.id = s.event_id
         WHERE s.channel = %s ORDER BY s.position
        """,
        [channel],
    )


@pytest.mark.parametrize(
    ("counter", "clone"),
    [("behind", False), ("behind", True), ("between", False), ("ahead", False)],
)
def test_nothing_is_lost_or_repeated_wherever_the_transaction_counter_stands(
    database: Database, other_cluster: Postgres, tmp_path: Path, counter: str, clone: bool
) -> None:
    """Transaction ids of the old cluster have no meaning in the new one.

    Those of committed events that are not sequenced are below or above the new cluster's counter,
    or around it. A clone that was made by copying the files has the same system identifier as the
    old cluster.
    """
    scratch = Database(other_cluster, "postgres")
    sequenced_at = next_xid(scratch) + (-5000 if counter == "ahead" else 5000)
    if counter == "ahead":
        advance_xid(scratch, next_xid(database) + 10_000)
    else:
        advance_xid(database, sequenced_at)

    for n in range(1, 4):
        database.send("a", f"sequenced {n}")
    with database.connect(autocommit=False) as unfinished:
        unfinished.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', 'no')")
        unfinished.execute("SET CONSTRAINTS ALL IMMEDIATE")  # it is in the outbox now
        assert database.value("SELECT pg_eventstream_sequence()") == 3
        for n in range(4, 7):
            advance_xid(database, next_xid(database) + 2000)
            database.send("a", f"committed {n}")
            database.send("b", f"committed {n}")
        dump(database, tmp_path / "dump")
    if counter == "between":
        advance_xid(scratch, next_xid(database) - 3000)

    new = restore(tmp_path / "dump", other_cluster, database.name)
    if clone:
        new.execute(
            "UPDATE pg_eventstream_cursor"
            "   SET cluster = (SELECT system_identifier FROM pg_control_system())"
        )
    snapshot, committed = new.fetch(
        "SELECT pg_snapshot_xmax(snapshot)::text::bigint, (SELECT max(xid)::text::bigint"
        " FROM pg_eventstream_outbox) FROM pg_eventstream_cursor"
    )[0]
    now = next_xid(new)
    assert {
        "behind": now < snapshot,
        "between": snapshot < now < committed,
        "ahead": committed < now,
    }[counter]

    # A transaction that is open when the new cluster's outbox is first read.
    with new.connect(autocommit=False) as late:
        late.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('b', 'late')")
        late.execute("SET CONSTRAINTS ALL IMMEDIATE")
        assert new.value("SELECT pg_eventstream_sequence()") == 6
        new.send("b", "new")
        assert new.value("SELECT pg_eventstream_sequence()") == 1
        late.commit()
    assert new.value("SELECT pg_eventstream_sequence()") == 1
    new.send("a", "new")
    assert new.value("SELECT pg_eventstream_sequence()") == 1
    # The new cluster passes the old cluster's ids one by one. None of them may have a meaning.
    advance_xid(new, max(now, committed) + 100)
    assert new.value("SELECT pg_eventstream_sequence()") == 0

    assert in_order(new, "a") == [
        *((n, f"sequenced {n}") for n in range(1, 4)),
        *((n, f"committed {n}") for n in range(4, 7)),
        (7, "new"),
    ]
    assert in_order(new, "b") == [
        *((n - 3, f"committed {n}") for n in range(4, 7)),
        (4, "new"),
        (5, "late"),
    ]
    positions = [position for (position,) in new.fetch(
        "SELECT position FROM pg_eventstream_stream ORDER BY position"
    )]  # fmt: skip
    assert positions == list(range(1, 13))


@pytest.mark.parametrize("counter", ["behind", "ahead"])
def test_consumers_continue_in_another_cluster(
    database: Database, other_cluster: Postgres, tmp_path: Path, counter: str
) -> None:
    """They have the same checkpoints, and positions have the same meaning."""
    handled: list[int] = []
    own = consumer("stock", start="earliest")(lambda event: handled.append(event.eid))
    del declare._declared["stock"]
    scratch = Database(other_cluster, "postgres")
    behind, ahead = (scratch, database) if counter == "behind" else (database, scratch)
    advance_xid(ahead, next_xid(behind) + 1000)
    for _ in range(3):
        database.send("a")
    assert own.drain() == 3
    for _ in range(2):
        database.send("a")
    dump(database, tmp_path / "dump")
    new = restore(tmp_path / "dump", other_cluster, database.name)
    with as_default(new):
        assert own.drain() == 2
        new.send("a")
        assert own.drain() == 1
        assert own.drain() == 0
    assert handled == [1, 2, 3, 4, 5, 6]


def test_copy_in_the_same_cluster_continues(database: Database, tmp_path: Path) -> None:
    """The transaction ids are still those of this cluster and keep their meaning."""
    database.send("a", "sequenced")
    database.execute("SELECT pg_eventstream_sequence()")
    with database.connect(autocommit=False) as unfinished:
        unfinished.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', 'no')")
        unfinished.execute("SET CONSTRAINTS ALL IMMEDIATE")
        database.send("a", "committed")
        dump(database, tmp_path / "dump")
    copy = restore(tmp_path / "dump", database.postgres, f"{database.name}_copy")
    copy.send("a", "new")
    assert copy.value("SELECT pg_eventstream_sequence()") == 2
    assert in_order(copy, "a") == [(1, "sequenced"), (2, "committed"), (3, "new")]
    assert database.value("SELECT pg_eventstream_sequence()") == 2
    assert in_order(database, "a") == [(1, "sequenced"), (2, "no"), (3, "committed")]


@pytest.mark.parametrize("arguments", [(), ("--disable-triggers",)])
def test_rows_alone_can_be_restored_into_a_migrated_database(
    database: Database, other_cluster: Postgres, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """The trigger exists already and fires for every event that is restored."""
    database.send("a", "sequenced")
    database.execute("SELECT pg_eventstream_sequence()")
    database.send("a", "committed")
    dump(database, tmp_path / "schema", "--schema-only")
    dump(database, tmp_path / "rows", "--data-only", "--table=pg_eventstream_*")

    new = restore(tmp_path / "schema", other_cluster, database.name)
    subprocess.run(
        [
            *(str(other_cluster.program("pg_restore")), "--exit-on-error", *arguments),
            *(f"--dbname={new.dsn}", str(tmp_path / "rows")),
        ],
        check=True,
        timeout=60,
    )
    new.send("a", "new")
    new.execute("SELECT pg_eventstream_sequence()")
    assert in_order(new, "a") == [(1, "sequenced"), (2, "committed"), (3, "new")]
