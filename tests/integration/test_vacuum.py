"""Vacuum and this package do not block each other, on any of the tables.

A lock that keeps other sessions out of a table keeps vacuum out, too. Autovacuum then skips the
table, or, if it came first, blocks the other session until it is cancelled a second later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psycopg
import pytest
from django.apps import apps
from django.db import connections, transaction

from pg_eventstream.grip.proxy import Proxy
from pg_eventstream.management.importing import import_events
from pg_eventstream.publisher.daemon import register
from pg_eventstream.publisher.pruner import Pruner
from pg_eventstream.send import send_event
from pg_eventstream.streams import replay
from pg_eventstream.tables.fixtures import forget_cursor
from tests.support.database import Database
from tests.support.faults import locked

PATIENCE = "500ms"


def tables() -> list[str]:
    return [model._meta.db_table for model in apps.get_app_config("pg_eventstream").get_models()]


@contextmanager
def _ours(database: Database) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    with database.connect(autocommit=False) as connection:
        connection.execute(f"SET LOCAL lock_timeout = '{PATIENCE}'")
        yield connection
        connection.rollback()


@contextmanager
def sequencing(database: Database) -> Iterator[None]:
    database.send("a")
    with _ours(database) as connection:
        assert connection.execute("SELECT pg_eventstream_sequence()").fetchone() == (1,)
        yield


@contextmanager
def pruning(database: Database) -> Iterator[None]:
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '2 days'")
    with _ours(database) as connection:
        assert Pruner(connection).run_once() == 1
        yield


@contextmanager
def importing(database: Database) -> Iterator[None]:
    database.execute(
        "CREATE TABLE django_eventstream_event (id bigint, channel text, type text, data text,"
        " eid bigint, created timestamptz);"
        "CREATE TABLE django_eventstream_eventcounter (id bigint, name text, value bigint,"
        " updated timestamptz);"
        "INSERT INTO django_eventstream_eventcounter VALUES (1, 'room', 1, now());"
        "INSERT INTO django_eventstream_event VALUES (1, 'room', 'message', '\"1\"', 1, now())"
    )
    with _ours(database) as connection:
        assert import_events("default", connection).events == 1
        yield


@contextmanager
def registering(database: Database) -> Iterator[None]:
    with _ours(database) as connection:
        register(connection, "me", [Proxy({"control_uri": "http://127.0.0.1:1"})])
        yield


@contextmanager
def _in_django(database: Database, work: Callable[[], object]) -> Iterator[None]:
    with transaction.atomic():
        with connections["default"].cursor() as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = '{PATIENCE}'")
        work()
        yield
        transaction.set_rollback(True)


def loading(database: Database) -> AbstractContextManager[None]:
    return _in_django(database, lambda: forget_cursor(connections["default"]))


def sending(database: Database) -> AbstractContextManager[None]:
    def send() -> None:
        send_event("a", "message", {})
        connections["default"].check_constraints()  # the trigger's work

    return _in_django(database, send)


def recovering(database: Database) -> AbstractContextManager[None]:
    return _in_django(database, lambda: replay.replay({"a": 0}))


WORK = [sequencing, pruning, importing, registering, loading, sending, recovering]
Work = Callable[[Database], AbstractContextManager[None]]


@pytest.fixture
def database(database: Database) -> Database:
    database.send("a")
    database.execute("SELECT pg_eventstream_sequence()")
    return database


@pytest.mark.parametrize("work", WORK)
def test_vacuum_gets_into_every_table_while_a_transaction_is_at_work(
    database: Database, work: Work
) -> None:
    with work(database), database.connect() as vacuum:
        vacuum.execute(f"SET lock_timeout = '{PATIENCE}'")
        for table in tables():
            vacuum.execute(f"VACUUM (TRUNCATE off) {table}")


@pytest.mark.parametrize("work", WORK)
def test_work_continues_while_vacuum_is_in_every_table(database: Database, work: Work) -> None:
    vacuums = locked(database, f"LOCK TABLE {', '.join(tables())} IN SHARE UPDATE EXCLUSIVE MODE")
    with vacuums, work(database):
        pass


def test_lock_that_keeps_vacuum_out_is_noticed(database: Database) -> None:
    with (
        locked(database, "LOCK TABLE pg_eventstream_cursor IN SHARE ROW EXCLUSIVE MODE"),
        database.connect() as vacuum,
    ):
        vacuum.execute(f"SET lock_timeout = '{PATIENCE}'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            vacuum.execute("VACUUM (TRUNCATE off) pg_eventstream_cursor")
