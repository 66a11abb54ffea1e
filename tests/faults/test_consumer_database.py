"""The database is replaced under processes that run consumers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from django.db import connections

from pg_eventstream.servers.processes import wait_until
from tests.support.consumers import ConsumerProcess, Handled, declared
from tests.support.database import Database
from tests.support.dumped_database import dump, restore

pytestmark = [pytest.mark.faults]

STOCK = {"name": "stock", "handler": "record", "start": "earliest"}
CHANNELS = ["a", "b", "c", "d", "e"]
#: For each channel: handled before the dump, in the dump and not handled, and lost with the old
#: database.
BEFORE, WAITING, LOST = 4, 2, 3


def send(database: Database, count: int) -> None:
    for channel in CHANNELS:
        for n in range(count):
            database.send(channel, str(n))


def drop(database: Database) -> None:
    """In spite of the sessions of the consumers."""
    connections.close_all()
    server = Database(database.postgres, "postgres")
    server.execute(f"DROP DATABASE {database.name} WITH (FORCE)")


def fill(database: Database, path: Path) -> None:
    pg_restore = str(database.postgres.program("pg_restore"))
    subprocess.run(
        [
            *(pg_restore, "--data-only", "--disable-triggers", "--exit-on-error"),
            *(f"--dbname={database.dsn}", str(path)),
        ],
        check=True,
        timeout=60,
    )


def eids(count: int) -> dict[str, list[int]]:
    return {channel: [*range(1, count + 1)] for channel in CHANNELS}


def test_processes_continue_in_a_database_that_replaces_theirs(
    database: Database, tmp_path: Path
) -> None:
    """With what that one has handled: nothing is skipped, and nothing comes twice."""
    handled = Handled(database)
    send(database, BEFORE)
    with ConsumerProcess("--processes", "2", environment=declared(STOCK)) as process:
        handled.wait("stock", len(CHANNELS) * BEFORE)
        database.execute("UPDATE pg_eventstream_consumer SET paused = true")
        send(database, WAITING)
        dump(database, tmp_path / "dump")
        database.execute("UPDATE pg_eventstream_consumer SET paused = false")
        send(database, LOST)
        handled.wait("stock", len(CHANNELS) * (BEFORE + WAITING + LOST))
        # It is restored under another name, so that the processes do not see an incomplete copy.
        copy = restore(tmp_path / "dump", database.postgres, f"{database.name}_copy")
        copy.execute("UPDATE pg_eventstream_consumer SET paused = false")
        drop(database)
        process.wait_for_log("connecting again")
        Database(database.postgres, "postgres").execute(
            f"ALTER DATABASE {copy.name} RENAME TO {database.name}"
        )
        handled.wait("stock", len(CHANNELS) * (BEFORE + WAITING), timeout=40)
        send(database, 1)
        handled.wait("stock", len(CHANNELS) * (BEFORE + WAITING + 1))
        assert process.running
        assert "starting another" not in process.log
        assert "ERROR" not in process.log
    assert handled.eids("stock") == eids(BEFORE + WAITING + 1)
    assert database.fetch("SELECT FROM handled WHERE replayed") == []
    assert database.fetch("SELECT FROM pg_eventstream_slot WHERE stopped OR failing > 0") == []


def test_processes_that_see_a_database_without_rows_say_that_they_stop(
    database: Database, tmp_path: Path
) -> None:
    """As while pg_restore fills it: none of them begins as a new consumer."""
    handled = Handled(database)
    send(database, BEFORE)
    with ConsumerProcess("--processes", "2", environment=declared(STOCK)) as process:
        handled.wait("stock", len(CHANNELS) * BEFORE)
        dump(database, tmp_path / "dump")
        drop(database)
        restore(tmp_path / "dump", database.postgres, database.name, "--schema-only")
        wait_until(lambda: process.log.count("stopped here") == 2, timeout=40)
        assert "it was removed" in process.log
        assert database.fetch("SELECT FROM pg_eventstream_consumer") == []
        # They are not in the way of others, once the rows are there.
        fill(database, tmp_path / "dump")
        send(database, 1)
        with ConsumerProcess(environment=declared(STOCK)):
            handled.wait("stock", len(CHANNELS) * (BEFORE + 1))
        assert process.running
    assert handled.eids("stock") == eids(BEFORE + 1)
