"""A process that handles events in one of the ways that consumers are compared with.

    python -m benchmarks.consuming outbox BATCH
    python -m benchmarks.consuming eventsourcing

It runs until it is killed. The handler of each way is one INSERT (`EFFECT`), in the transaction
that also stores that the event is handled. Except for eventsourcing, which has a connection of its
own, it is the same function, on Django's connection. Statements are prepared everywhere.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import psycopg

#: What was handled, and when.
TABLE = """
    CREATE TABLE effect (event bigint NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp())
"""
EFFECT = "INSERT INTO effect (event) VALUES (%s)"

OUTBOX = """
    CREATE TABLE outbox (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, channel text NOT NULL,
        data text NOT NULL)
"""
CLAIM = """
    DELETE FROM outbox WHERE id = ANY(ARRAY(
        SELECT id FROM outbox ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED))
    RETURNING id, channel, data
"""


def handle(number: int) -> None:
    """The handler, as a project of Django's would write it."""
    from django.db import connection

    psycopg.Cursor(connection.connection).execute(EFFECT, [number])


def outbox(batch: int) -> None:
    """A usual outbox. Any free worker takes the next rows, so order is not kept."""
    import django
    from django.db import connection as wrapper

    django.setup()
    wrapper.ensure_connection()
    connection = wrapper.connection
    with psycopg.connect(autocommit=True) as listener:
        listener.execute("LISTEN outbox")
        while True:
            with connection.transaction():
                rows = psycopg.Cursor(connection).execute(CLAIM, [batch]).fetchall()
                for number, _channel, _data in rows:
                    handle(number)
            if not rows:
                for _ in listener.notifies(timeout=5, stop_after=1):
                    pass


def eventsourcing() -> None:
    """The projection runner of the package, as its documentation shows it."""
    # Not `from __future__` annotations in these classes: the package reads their types.
    from .eventsourced import runner

    with runner():
        threading.Event().wait()


def eventsourcing_environment(environment: dict[str, str]) -> dict[str, str]:
    return {
        **environment,
        "PERSISTENCE_MODULE": "eventsourcing.postgres",
        "POSTGRES_DBNAME": environment["PGDATABASE"],
        "POSTGRES_HOST": environment["PGHOST"],
        "POSTGRES_PORT": environment["PGPORT"],
        "POSTGRES_USER": environment["PGUSER"],
        "POSTGRES_PASSWORD": "trusted",
    }


def main(way: str, *arguments: str) -> None:
    ways: dict[str, Callable[..., Any]] = {"outbox": outbox, "eventsourcing": eventsourcing}
    ways[way](*map(int, arguments))


if __name__ == "__main__":
    assert os.environ["PGDATABASE"]
    main(*sys.argv[1:])
