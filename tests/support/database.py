"""A test's own database."""

from __future__ import annotations

from typing import Any

import psycopg

from pg_eventstream.servers.postgres import Postgres


class Database:
    """A test's own database."""

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
        """As a service that is not Python does."""
        self.execute(
            "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s)", [channel, data]
        )
