"""Events of all kinds that Django dumps and loads again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from django.core.management import call_command
from django.db import connections
from django.test import override_settings

from pg_eventstream import get_events
from pg_eventstream.publisher.pruner import Pruner
from tests.support.database import Database


@contextmanager
def as_default(database: Database) -> Iterator[None]:
    address = connections["default"].settings_dict
    before = dict(address)
    connections.close_all()
    address.update(NAME=database.name, PORT=database.postgres.port)
    try:
        yield
    finally:
        connections.close_all()
        address.update(before)


def sequence(database: Database) -> int:
    return int(database.value("SELECT pg_eventstream_sequence()"))


def in_order(database: Database, channel: str) -> list[tuple[int, str]]:
    """What clients get of a channel: eids and data, in the order of the stream."""
    return database.fetch(
        """
        SELECT s.eid, e.data FROM pg_eventstream_stream s
          LEFT JOIN pg_eventstream_event e ON e.id = s.event_id
         WHERE s.channel = %s ORDER BY s.position
        """,
        [channel],
    )


def fill(database: Database) -> None:
    """Send events of all kinds: pruned, sequenced, committed, of overlapping transactions."""
    for n in range(1, 4):
        database.send("a", f"pruned {n}")
        database.send("idle", f"pruned {n}")
    sequence(database)
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '2 days'")
    with database.connect() as connection, override_settings(GRIP_URL=None):
        assert Pruner(connection).run_once() == 6
    for n in range(4, 7):
        database.send("a", f"sequenced {n}")
        database.send("b", f'sequenced "{n}" <&>\nSüß')
    sequence(database)
    with database.connect(autocommit=False) as late, database.connect(autocommit=False) as first:
        late.execute(
            "INSERT INTO pg_eventstream_event (channel, data, skip_user_ids)"
            " VALUES ('a', 'committed 8', '{7,x}')"
        )
        first.execute(
            "INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', 'committed 7')"
        )
        first.commit()
        late.commit()


A = [
    *((n, f"sequenced {n}") for n in range(4, 7)),
    (7, "committed 7"),
    (8, "committed 8"),
]


def check(database: Database, *more: str) -> None:
    """Assert that all events exist once, in order, with their ids, and that more can be sent."""
    database.send("a", "new")
    database.send("idle", "new")
    sequence(database)
    sequence(database)
    sent = [*A, *enumerate([*more, "new"], start=9)]
    assert in_order(database, "a") == sent
    if connections["default"].settings_dict["NAME"] == database.name:
        # A client that was away during all this resumes where it was.
        for known in ("earliest", "a:5"):
            page = get_events(["a"], known)
            assert page.reset == []
            first = 0 if known == "earliest" else 2
            assert [event.data for event in page.events] == [text for _, text in sent[first:]]
    assert in_order(database, "b") == [(n - 3, f'sequenced "{n}" <&>\nSüß') for n in range(4, 7)]
    assert in_order(database, "idle") == [(4, "new")]
    assert database.fetch(
        "SELECT data, skip_user_ids FROM pg_eventstream_event WHERE skip_user_ids <> '{}'"
    ) == [("committed 8", ["7", "x"])]
    assert database.value("SELECT count(*) FROM pg_eventstream_cursor") == 1
    # The pruner can handle these rows, too.
    with database.connect() as connection, override_settings(GRIP_URL=None):
        assert Pruner(connection).run_once() == 0


def dumped(path: Path, *models: str, **options: object) -> Path:
    call_command("dumpdata", *models, output=str(path), verbosity=0, **options)
    return path


def load(*paths: Path) -> None:
    call_command("loaddata", *map(str, paths), verbosity=0)
