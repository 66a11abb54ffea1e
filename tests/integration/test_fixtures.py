"""dumpdata, flush, loaddata and other ways to serialize models: every event once, in order."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import psycopg
import pytest
from django.core import serializers
from django.core.management import call_command
from django.db import connections, transaction

from pg_eventstream.models import Channel, Cursor, Event, Outbox, Stream
from pg_eventstream.servers.postgres import Postgres
from tests.support import forked
from tests.support.database import Database
from tests.support.dumped_data import as_default, check, dumped, fill, in_order, load, sequence
from tests.support.environment import child_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def other(database: Database, postgres: Postgres) -> Iterator[Database]:
    """Another database, with empty tables."""
    name = f"{database.name}_other"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {database.name}")
        yield Database(postgres, name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def flush() -> None:
    call_command("flush", interactive=False, verbosity=0)


@pytest.mark.parametrize(
    ("models", "options"),
    [
        (["pg_eventstream"], {}),
        (["pg_eventstream"], {"use_base_manager": True}),
        (["pg_eventstream"], {"use_natural_foreign_keys": True, "use_natural_primary_keys": True}),
        (["pg_eventstream", "app", "auth"], {}),
        (["pg_eventstream"], {"format": "jsonl"}),
        (["pg_eventstream"], {"format": "xml"}),
        (["pg_eventstream"], {"exclude": ["pg_eventstream.cursor", "pg_eventstream.publisher"]}),
    ],
)
def test_dumped_flushed_and_loaded_every_event_is_there_once(
    database: Database, tmp_path: Path, models: list[str], options: dict[str, object]
) -> None:
    fill(database)
    dump = dumped(tmp_path / f"dump.{options.get('format', 'json')}", *models, **options)
    flush()
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0
    load(dump)
    check(database)


def test_loaded_into_another_database(database: Database, other: Database, tmp_path: Path) -> None:
    fill(database)
    dump = dumped(tmp_path / "dump.json", "pg_eventstream")
    with as_default(other):
        load(dump)
        check(other)


def test_loaded_where_others_have_been_sent(
    database: Database, other: Database, tmp_path: Path
) -> None:
    fill(database)
    dump = dumped(tmp_path / "dump.json", "pg_eventstream")
    other.execute("SELECT setval('pg_eventstream_event_id_seq', 1000)")
    for n in range(3):
        other.send("other", f"sequenced {n}")
    sequence(other)
    other.execute("UPDATE pg_eventstream_stream SET position = position + 1000")
    other.execute("UPDATE pg_eventstream_cursor SET position = position + 1000")
    other.send("other", "committed")
    with as_default(other):
        load(dump)
        check(other)
    assert in_order(other, "other") == [
        *((n + 1, f"sequenced {n}") for n in range(3)),
        (4, "committed"),
    ]


@pytest.mark.parametrize("sequenced_between", [False, True])
def test_loaded_twice_is_loaded_once(
    database: Database, other: Database, tmp_path: Path, sequenced_between: bool
) -> None:
    fill(database)
    dump = dumped(tmp_path / "dump.json", "pg_eventstream")
    with as_default(other):
        load(dump)
        if sequenced_between:
            sequence(other)
        load(dump)
        check(other)


def test_loaded_over_what_it_was_dumped_from(database: Database, tmp_path: Path) -> None:
    fill(database)
    dump = dumped(tmp_path / "dump.json", "pg_eventstream")
    sequence(database)
    database.send("a", "since then")
    load(dump)
    check(database, "since then")


def test_idle_channel_is_not_set_back_by_an_older_dump(database: Database, tmp_path: Path) -> None:
    fill(database)
    dump = dumped(tmp_path / "dump.json", "pg_eventstream.channel")
    database.execute("UPDATE pg_eventstream_channel SET pruned = 10 WHERE name = 'idle'")
    load(dump)
    database.send("idle", "new")
    sequence(database)
    assert in_order(database, "idle") == [(11, "new")]


def test_dump_of_events_alone_sends_them(
    database: Database, other: Database, tmp_path: Path
) -> None:
    """As with a fixture that was written by hand."""
    database.send("a", "1")
    database.send("a", "2")
    dump = dumped(tmp_path / "dump.json", "pg_eventstream.event")
    with as_default(other):
        load(dump)
    assert sequence(other) == 2
    other.send("a", "3")
    assert sequence(other) == 1
    assert in_order(other, "a") == [(1, "1"), (2, "2"), (3, "3")]


@pytest.mark.parametrize("first", ["pg_eventstream.event", "pg_eventstream.stream"])
def test_events_and_their_places_may_be_loaded_from_several_files(
    database: Database, tmp_path: Path, first: str
) -> None:
    database.send("a", "1")
    database.send("a", "2")
    sequence(database)
    paths = {
        model: dumped(tmp_path / f"{model.replace('.', '_')}.json", model)
        for model in ("pg_eventstream.event", "pg_eventstream.stream")
    }
    flush()
    load(*sorted(paths.values(), key=lambda path: path != paths[first]))
    sequence(database)
    assert in_order(database, "a") == [(1, "1"), (2, "2")]


def test_place_whose_event_was_sent_after_the_events_were_dumped_is_left_out(
    database: Database, tmp_path: Path
) -> None:
    """dumpdata reads one table after the other, while other sessions change them."""
    database.send("a", "1")
    sequence(database)
    events = dumped(tmp_path / "events.json", "pg_eventstream.event")
    database.send("a", "2")
    sequence(database)
    places = dumped(tmp_path / "places.json", "pg_eventstream.stream")
    flush()
    load(events, places)
    database.send("a", "3")
    sequence(database)
    assert in_order(database, "a") == [(1, "1"), (2, "3")]


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("beside", ["nothing", "sequencing"])
def test_objects_may_be_serialised_by_a_program(
    database: Database, other: Database, atomic: bool, beside: str
) -> None:
    for n in range(1, 3):
        database.send("a", str(n))
    sequence(database)
    for n in range(3, 5):
        database.send("a", str(n))
    models = (Event, Outbox, Stream, Channel, Cursor)
    objects = [row for model in models for row in model._default_manager.order_by("pk")]
    text = serializers.serialize("json", objects)
    with as_default(other):
        with transaction.atomic() if atomic else nullcontext():
            for loaded in serializers.deserialize("json", text):
                loaded.save()
                if beside == "sequencing" and not atomic:
                    sequence(other)
        sequence(other)
    assert in_order(other, "a") == [(n, str(n)) for n in range(1, 5)]


def test_state_of_a_cluster_is_not_loaded(
    database: Database, other: Database, tmp_path: Path
) -> None:
    database.send("a", "1")
    sequence(database)
    database.execute("INSERT INTO pg_eventstream_proxy (name, position) VALUES ('p', 77)")
    database.execute("INSERT INTO pg_eventstream_publisher VALUES (1, 'there', now(), now())")
    dump = dumped(tmp_path / "dump.json", "pg_eventstream")
    other.execute("INSERT INTO pg_eventstream_proxy (name, position) VALUES ('p', 7)")
    with as_default(other):
        load(dump)
    assert other.fetch("SELECT name, position FROM pg_eventstream_proxy") == [("p", 7)]
    assert other.fetch("SELECT name FROM pg_eventstream_publisher") == []
    sequence(other)
    assert other.value("SELECT count(*) FROM pg_eventstream_cursor") == 1


def test_transaction_ids_can_be_looked_up(database: Database) -> None:
    database.send("a", "1")
    database.send("a", "2")
    first, second = Outbox.objects.order_by("seq")
    assert isinstance(first.xid, int)
    assert first.xid < second.xid
    outbox = Outbox.objects.order_by("seq")
    assert list(outbox.filter(xid=first.xid)) == [first]
    assert list(outbox.filter(xid__gt=first.xid)) == [second]
    assert list(outbox.filter(xid__in=[first.xid, second.xid])) == [first, second]
    assert list(outbox.filter(xid__range=(first.xid, first.xid))) == [first]
    assert outbox.get(pk=first.pk) == first
    assert outbox.filter(pk__in=[first.pk]).update(channel="b") == 1
    first.channel = "c"
    first.save()
    assert [event.channel for event in outbox] == ["c", "a"]
    assert outbox.filter(xid=first.xid).delete()[0] == 1
    cursor = Cursor.objects.first()
    if cursor is not None:
        cursor.save()


def test_flush_loses_what_it_empties_and_nothing_else(database: Database) -> None:
    database.send("a", "before")
    sequence(database)
    flush()
    database.send("a", "after")
    assert sequence(database) == 1
    assert [data for _, data in in_order(database, "a")] == ["after"]


@pytest.mark.parametrize("sequenced", [False, True])
def test_copy_by_template_continues_where_the_database_was(
    database: Database, sequenced: bool
) -> None:
    """As the test runner does for its parallel processes."""
    fill(database)
    if sequenced:
        sequence(database)
    connections.close_all()
    name = f"{database.name}_copy"
    with psycopg.connect(database.postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {database.name}")
        try:
            check(Database(database.postgres, name))
            check(database)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


_MIGRATION = """
from django.db import migrations
from pg_eventstream import send_event

def send(apps, schema_editor):
    for n in range(3):
        send_event("news", "message", n)

class Migration(migrations.Migration):
    dependencies = [("pg_eventstream", "0001_initial")]
    operations = [migrations.RunPython(send)]
"""
_TESTS = """
from django.db import connection
from django.test import TestCase, TransactionTestCase
from pg_eventstream import get_events, send_event

class Base:
    def check(self):
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_eventstream_sequence()")
        send_event("news", "message", 3)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_eventstream_sequence()")
            self.assertEqual(cursor.fetchone(), (1,))
            cursor.execute("SELECT pg_eventstream_sequence()")
            self.assertEqual(cursor.fetchone(), (0,))
        events = get_events(["news"], "earliest").events
        self.assertEqual([event.json() for event in events], [0, 1, 2, 3])

    def test_1(self):
        self.check()

    def test_2(self):
        self.check()

class RollbackTest(Base, TransactionTestCase):
    serialized_rollback = True

class RollbackOfSomeAppsTest(Base, TransactionTestCase):
    serialized_rollback = True
    available_apps = ["pgtrigger", "pg_eventstream", "news"]
"""


@pytest.mark.faults
@pytest.mark.thorough
@pytest.mark.parametrize("arguments", [[], ["--parallel=2"], ["--reverse"]])
def test_serialized_rollback_brings_back_what_a_migration_has_sent(
    database: Database, tmp_path: Path, arguments: list[str]
) -> None:
    for path, text in {
        "news/__init__.py": "",
        "news/models.py": "",
        "news/migrations/__init__.py": "",
        "news/migrations/0001_initial.py": _MIGRATION,
        "news/tests.py": _TESTS,
        "news_settings.py": (
            "from tests.project.settings import *\n"
            "INSTALLED_APPS = [*INSTALLED_APPS, 'news']\n"
            f"DATABASES['default']['NAME'] = {database.name!r}\n"
        ),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    done = forked.run(
        [sys.executable, "-m", "django", "test", "--settings=news_settings", *arguments],
        directory=tmp_path,
        environment=child_environment(PYTHONPATH=f"{tmp_path}:{ROOT}"),
    )
    assert done.returncode == 0, done.stderr
    assert "Ran 4 tests" in done.stderr
