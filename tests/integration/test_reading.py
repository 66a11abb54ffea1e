"""Many clients read through few connections."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import ProgrammingError, connection

from pg_eventstream.postgres.threads import run
from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database


def pid() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid(), pg_sleep(0.01)")
        return int(cursor.fetchone()[0])


def test_many_reads_share_a_few_connections_that_end_with_the_work(database: Database) -> None:
    with ThreadPoolExecutor(30) as pool:
        pids = list(pool.map(lambda _: run(pid), range(200)))
    assert 1 <= len(set(pids)) <= 4
    others = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    wait_until(lambda: database.value(others) == 0, timeout=10)


def test_lost_connection_is_replaced(database: Database) -> None:
    seen: set[int] = set()
    for _ in range(5):
        session = run(pid)
        assert session not in seen
        seen.add(session)
        assert database.value("SELECT pg_terminate_backend(%s, 10000)", [session])


def test_error_is_raised_where_the_result_is_wanted(database: Database) -> None:
    def fail() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT nothing")

    with pytest.raises(ProgrammingError):
        run(fail)
    assert run(pid)
