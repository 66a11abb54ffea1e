"""The content of the tables, and its age."""

from __future__ import annotations

from datetime import timedelta

from tests.support.database import Database

DAY = timedelta(hours=24)


def age(database: Database, *, events_of: str, by: timedelta) -> None:
    database.execute(
        "UPDATE pg_eventstream_stream SET sequenced_at = sequenced_at - %s WHERE channel = %s",
        [by, events_of],
    )


def data(database: Database) -> list[str]:
    return [row[0] for row in database.fetch("SELECT data FROM pg_eventstream_event ORDER BY id")]


def make_older(database: Database, seconds: float) -> None:
    database.execute(
        "UPDATE pg_eventstream_stream SET sequenced_at = sequenced_at - make_interval(secs => %s)",
        [seconds],
    )
