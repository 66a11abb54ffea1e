"""Events that loaddata loads while a publisher runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database
from tests.support.dumped_data import A, as_default, check, dumped, fill, in_order, load
from tests.support.publisher import NewPublisher


@pytest.fixture
def other(database: Database, postgres: Postgres) -> Iterator[Database]:
    """Another database, with empty tables."""
    name = f"{database.name}_other"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {database.name}")
        yield Database(postgres, name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_loaded_while_a_publisher_runs(
    database: Database,
    other: Database,
    new_publisher: NewPublisher,
    tmp_path: Path,
) -> None:
    fill(database)
    dump = dumped(tmp_path / "dump.json", "pg_eventstream")
    publisher = new_publisher(PG_EVENTSTREAM_TEST_DSN=other.dsn).lead()
    with as_default(other):
        load(dump)
        wait_until(lambda: in_order(other, "a") == A, timeout=30)
        other.send("a", "since then")
        wait_until(lambda: len(in_order(other, "a")) == len(A) + 1, timeout=30)
        check(other, "since then")
    publisher.stop()
    assert "database:" not in publisher.log, publisher.log
    assert "Traceback" not in publisher.log, publisher.log
