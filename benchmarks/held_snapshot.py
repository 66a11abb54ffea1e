"""What a session that holds a snapshot for hours costs the sequence.

While it does, vacuum can remove nothing that was dead since, and a table whose one row is
updated again and again grows a tail of dead versions. Compared, interleaved in one run:

    cursor keyed by position   ours: each write moves the key, the newest is found at once
    counter updated in place   the same function, its cursor found by a constant key

Prints, for both, how long a call takes at the end relative to the beginning.

    python -m benchmarks.held_snapshot [--calls 30000]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from pg_eventstream.demo.postgres import Postgres

ROUND = 500

IN_PLACE = """
ALTER TABLE pg_eventstream_cursor ADD COLUMN one smallint NOT NULL DEFAULT 1 UNIQUE;
"""


def in_place(definition: str) -> str:
    """Our function, with its cursor a row that is updated in place."""
    changed = definition.replace(
        "SELECT * INTO last FROM pg_eventstream_cursor ORDER BY position DESC LIMIT 1;",
        "SELECT * INTO last FROM pg_eventstream_cursor WHERE one = 1;",
    ).replace(
        """DELETE FROM pg_eventstream_cursor WHERE position = last.position;
        INSERT INTO pg_eventstream_cursor (position, snapshot, cluster)
        VALUES (coalesce(last.position, 0) + moved, cur, here);""",
        """INSERT INTO pg_eventstream_cursor (position, snapshot, cluster)
        VALUES (coalesce(last.position, 0) + moved, cur, here)
        ON CONFLICT (one) DO UPDATE SET position = excluded.position,
            snapshot = excluded.snapshot, cluster = excluded.cluster;""",
    )
    assert changed.count("one") >= definition.count("one") + 2
    return changed


def migrated(postgres: Postgres, name: str) -> psycopg.Connection[Any]:
    from django.core.management import call_command
    from django.db import connections

    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    connections.close_all()
    connections["default"].settings_dict["NAME"] = name
    call_command("migrate", "pg_eventstream", verbosity=0)
    return psycopg.connect(postgres.dsn(name), autocommit=True)


def milliseconds(connection: psycopg.Connection[Any]) -> float:
    """The median time of a call that finds one event."""
    times = []
    for _ in range(ROUND):
        connection.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', '1')")
        start = time.perf_counter()
        connection.execute("SELECT pg_eventstream_sequence()")
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=30_000)
    calls = parser.parse_args().calls
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        Postgres(Path(directory), settings={"fsync": "off"}) as postgres,
    ):
        os.environ["PG_EVENTSTREAM_TEST_DSN"] = postgres.dsn()
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
        import django

        django.setup()
        sessions = {"keyed by position": migrated(postgres, "keyed")}
        other = sessions["updated in place"] = migrated(postgres, "in_place")
        row = other.execute(
            "SELECT pg_get_functiondef('pg_eventstream_sequence()'::regprocedure)"
        ).fetchone()
        assert row
        other.execute(IN_PLACE)
        other.execute(in_place(row[0]))

        held = []
        for name in ("keyed", "in_place"):
            connection = psycopg.connect(postgres.dsn(name))
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            connection.execute("SELECT 1")
            held.append(connection)
        figures: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(calls // ROUND):
            for name, session in sessions.items():
                figures[name].append(milliseconds(session))
            print(".", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        version = postgres.program("postgres")
        print(f"{calls} calls beside a held snapshot, {version.name}, {os.cpu_count()} cores")
        for name, values in figures.items():
            first, last = statistics.median(values[:3]), statistics.median(values[-3:])
            print(f"{name:20} {first:7.3f} ms -> {last:7.3f} ms  x {last / first:.2f}")
        for connection in [*held, *sessions.values()]:
            connection.close()


if __name__ == "__main__":
    main()
