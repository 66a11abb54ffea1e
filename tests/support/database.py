"""The PostgreSQL of a run, which starts when a test needs it, and a database for each test.

Its address is known earlier, because Django is set up with it. Until a test has a database, the
database in that address does not exist.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from django.core.management import call_command
from django.db import connections

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import HOST, free_port
from tests.support.environment import DIRECTORY, IN_MEMORY

_PORT = free_port()
#: The address that Django is set up with.
ADDRESS = f"postgresql://postgres@{HOST}:{_PORT}/of_no_test"
TEMPLATE = "template_migrated"


class Database:
    """The database of one test."""

    def __init__(self, postgres: Postgres, name: str) -> None:
        self.name = name
        self.dsn = postgres.dsn(name)
        self.postgres = postgres

    def connect(self, **kwargs: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn, **{"autocommit": True, **kwargs})

    def fetch(self, query: str, params: Any = None) -> list[tuple[Any, ...]]:
        with self.connect() as connection:
            return connection.execute(query, params).fetchall()

    def value(self, query: str, params: Any = None) -> Any:
        return self.fetch(query, params)[0][0]

    def execute(self, query: str, params: Any = None) -> None:
        with self.connect() as connection:
            connection.execute(query, params)

    def send(self, channel: str, data: str = "{}") -> None:
        """Send an event as a service without Python does."""
        self.execute(
            "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s)", [channel, data]
        )


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Start the server, with a migrated database to copy."""
    # The programs of another version, for example /usr/lib/postgresql/15/bin.
    bin_dir = os.environ.get("PG_EVENTSTREAM_TEST_POSTGRES")
    postgres = Postgres(
        DIRECTORY / "postgres",
        port=_PORT,
        bin_dir=Path(bin_dir) if bin_dir else None,
        settings={
            "max_connections": "300",
            "max_prepared_transactions": "10",
            "log_statement": "none",
        },
    )
    postgres.start()
    try:
        Database(postgres, "postgres").execute(f"CREATE DATABASE {TEMPLATE}")
        with _in_use(postgres, TEMPLATE):
            call_command("migrate", run_syncdb=True, verbosity=0)
        yield postgres
    finally:
        postgres.stop("immediate")


@contextmanager
def new_database(postgres: Postgres, template: str = TEMPLATE) -> Iterator[Database]:
    """Create a migrated database that Django and every child process use.

    With ``template``, it is a copy of that database, which nobody may use just now.
    """
    name = f"test_{uuid.uuid4().hex[:12]}"
    server = Database(postgres, "postgres")
    with server.connect() as connection:
        # Copying files takes two thirds of the time of writing them to the WAL, too. But it syncs
        # them, which is cheap in memory alone. Before version 15 there is no choice.
        copies = IN_MEMORY and connection.info.server_version >= 150_000
        strategy = "STRATEGY file_copy" if copies else ""
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} {strategy}")
    try:
        with _in_use(postgres, name):
            yield Database(postgres, name)
    finally:
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def _in_use(postgres: Postgres, name: str) -> Iterator[None]:
    previous = os.environ["PG_EVENTSTREAM_TEST_DSN"], connections.settings["default"]["NAME"]

    def use(dsn: str, name: str) -> None:
        connections.close_all()
        os.environ["PG_EVENTSTREAM_TEST_DSN"] = dsn
        connections.settings["default"]["NAME"] = name
        connections["default"].settings_dict["NAME"] = name

    use(postgres.dsn(name), name)
    try:
        yield
    finally:
        use(*previous)
