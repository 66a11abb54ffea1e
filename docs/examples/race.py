"""Shows how a reader that polls ``id > last`` loses an event, and what other readers do.

    python race.py                                    # starts a PostgreSQL of its own
    python race.py "postgresql://user@host/database"  # uses yours

The first form needs ``pip install "pg-eventstream[demo]"``, the second ``pip install
pg-eventstream "psycopg[binary]"`` and a role that may create a schema. The script works in the
schema ``eventstream_race`` and removes it at the end. It does not rely on timing: each step is
finished before the next one begins, so the result is always the same.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psycopg
from psycopg.conninfo import conninfo_to_dict

SCHEMA = "eventstream_race"
OPTIONS = f"-c search_path={SCHEMA}"


class Reader(Protocol):
    def read(self) -> list[str]:
        """The names of the events that are new to this reader."""


class Poller(Reader):
    """A reader of an ordinary table. It remembers where it stopped, and asks for what is new."""

    def __init__(self, connection: psycopg.Connection[Any], column: str, condition: str = "true"):
        self.connection = connection
        self.query = f"""
            SELECT name, {column} FROM note
             WHERE ({column} > %(last)s OR %(last)s IS NULL) AND {condition}
             ORDER BY {column}
        """
        self.last: Any = None

    def read(self) -> list[str]:
        rows = self.connection.execute(self.query, {"last": self.last}).fetchall()
        if rows:
            self.last = rows[-1][1]
        return [name for name, _ in rows]


class EventStream(Reader):
    """A reader of pg_eventstream's events. It remembers the id of the last event."""

    def __init__(self) -> None:
        self.last = "earliest"

    def read(self) -> list[str]:
        from django.core.management import call_command

        from pg_eventstream import get_events

        call_command("eventstream_publisher", once=True, stdout=io.StringIO())
        page = get_events(["race"], self.last)
        self.last = page.last_event_id
        return [event.json() for event in page.events]


def race(dsn: str) -> dict[str, list[list[str]]]:
    """What each reader gets at each of four moments."""

    def connect(autocommit: bool = False) -> psycopg.Connection[Any]:
        return psycopg.connect(dsn, options=OPTIONS, autocommit=autocommit)

    def send(connection: psycopg.Connection[Any], name: str) -> None:
        connection.execute("INSERT INTO note (name) VALUES (%s)", [name])
        connection.execute(
            "INSERT INTO pg_eventstream_event (channel, data) VALUES ('race', to_jsonb(%s::text))",
            [name],
        )

    with connect(autocommit=True) as reader, connect() as a, connect() as b, connect() as other:
        reader.execute("""
            CREATE TABLE note (
                id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                name    text NOT NULL,
                created timestamptz NOT NULL DEFAULT now(),
                xid     xid8 NOT NULL DEFAULT pg_current_xact_id()
            )
        """)
        readers: dict[str, Reader] = {
            "id > last": Poller(reader, "id"),
            "created > last": Poller(reader, "created"),
            "xid below the watermark": Poller(
                reader, "id", "xid < pg_snapshot_xmin(pg_current_snapshot())"
            ),
            "pg_eventstream": EventStream(),
        }
        found: dict[str, list[list[str]]] = {name: [] for name in readers}

        def all_read() -> None:
            for name, one in readers.items():
                found[name].append(one.read())

        send(a, "A")  # draws the lower id, and takes its time
        send(b, "B")
        b.commit()
        all_read()
        a.commit()
        all_read()

        other.execute("SELECT pg_current_xact_id()")  # has nothing to do with events
        send(b, "C")
        b.commit()
        all_read()
        other.commit()
        all_read()
    return found


def table(found: dict[str, list[list[str]]]) -> str:
    head = ["reader", "B commits", "A commits", "C commits*", "later", "lost"]
    rows = [head]
    for name, reads in found.items():
        got = [event for read in reads for event in read]
        lost = [event for event in "ABC" if event not in got]
        rows.append([name, *(", ".join(events) or "-" for events in [*reads, lost])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", "* while a transaction that sends nothing stays open"])


@contextmanager
def tables(dsn: str) -> Iterator[None]:
    """A schema with the tables of pg_eventstream, as a Django project creates them."""
    import django
    from django.conf import settings
    from django.core.management import call_command
    from django.db import connections

    options = conninfo_to_dict(dsn, options=OPTIONS)
    options.pop("dbname", None)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {SCHEMA}")
        try:
            settings.configure(
                INSTALLED_APPS=["pgtrigger", "pg_eventstream"],
                DATABASES={
                    "default": {
                        "ENGINE": "django.db.backends.postgresql",
                        "NAME": connection.info.dbname,
                        "OPTIONS": options,
                    }
                },
            )
            django.setup()
            call_command("migrate", verbosity=0)
            yield
        finally:
            connections.close_all()
            connection.execute(f"DROP SCHEMA {SCHEMA} CASCADE")


def run(dsn: str) -> None:
    with tables(dsn):
        print(table(race(dsn)))


def main() -> None:
    if len(sys.argv) > 1:
        run(sys.argv[1])
        return
    from pg_eventstream.servers.postgres import Postgres

    with tempfile.TemporaryDirectory() as directory, Postgres(Path(directory)) as server:
        run(server.dsn())


if __name__ == "__main__":
    main()
