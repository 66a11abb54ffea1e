"""Events in a separate database: the tables are only there, or an error explains why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.checks import CheckMessage, run_checks
from django.core.management import CommandError, call_command
from django.db import connections
from django.db.migrations.recorder import MigrationRecorder
from django.test import override_settings

import pg_eventstream
from pg_eventstream.servers.postgres import Postgres
from tests.support.database import Database

OURS = "pg_eventstream.router.EventStreamRouter"
HERE = "tests.integration.test_second_database"
MIGRATIONS = sorted(
    path.stem for path in Path(pg_eventstream.__file__).parent.glob("migrations/[0-9]*.py")
)


class Denies:
    """A router that knows its own apps and not this one."""

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:
        return db == "default"


class KnowsModels:
    """A router that decides by the model, and so excludes what SQL creates."""

    def allow_migrate(
        self, db: str, app_label: str, model_name: str | None = None, **hints: Any
    ) -> bool:
        return model_name is not None


class KnowsNames:
    def allow_migrate(
        self, db: str, app_label: str, model_name: str | None = None, **hints: Any
    ) -> bool | None:
        return False if model_name == "event" else None


class Allows:
    def allow_migrate(self, *arguments: Any, **hints: Any) -> bool:
        return True


class Silent:
    """A router of another kind, which only routes reads and writes."""

    def db_for_read(self, model: Any, **hints: Any) -> None:
        return None


@pytest.fixture
def aliases(database: Database, postgres: Postgres, tmp_path: Path) -> Iterator[None]:
    """Add "events", which is empty, and "lite", which is not PostgreSQL, to "default"."""
    name = f"{database.name}_events"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    default = connections.settings["default"]
    connections.settings["events"] = {**default, "NAME": name}
    connections.settings["lite"] = {
        **default,
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(tmp_path / "lite.sqlite3"),
        # A file as well: Django does not close connections to databases in memory.
        "TEST": {**default["TEST"], "NAME": str(tmp_path / "test_lite.sqlite3")},
        "OPTIONS": {},
        "HOST": "",
        "PORT": "",
    }
    with override_settings(EVENTSTREAM_DATABASE="events"):
        yield
    for alias in ("events", "lite"):
        connections[alias].close()
        del connections[alias]
        del connections.settings[alias]
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def routed(*routers: str) -> override_settings:
    return override_settings(DATABASE_ROUTERS=[r if "." in r else f"{HERE}.{r}" for r in routers])


def migrate(alias: str, *arguments: str, **options: Any) -> None:
    call_command(
        "migrate",
        "pg_eventstream",
        *arguments,
        **{"database": alias, "verbosity": 0, "stdout": StringIO(), **options},
    )


def sql(alias: str) -> str:
    out = StringIO()
    call_command("sqlmigrate", "pg_eventstream", "0001", database=alias, stdout=out)
    return out.getvalue()


def tables(alias: str) -> set[str]:
    names = connections[alias].introspection.table_names()
    return {name for name in names if name.startswith("pg_eventstream_")}


def recorded(alias: str) -> list[str]:
    applied = MigrationRecorder(connections[alias]).applied_migrations()
    return sorted(name for app, name in applied if app == "pg_eventstream")


def record(alias: str, *names: str) -> None:
    recorder = MigrationRecorder(connections[alias])
    recorder.ensure_schema()
    for name in names:
        recorder.record_applied("pg_eventstream", name)


def check(databases: list[str] | None = None) -> list[CheckMessage]:
    found = run_checks(databases=databases)
    return [message for message in found if str(message.id).startswith("pg_eventstream.")]


def create_test_database(alias: str) -> None:
    connections[alias].creation.create_test_db(verbosity=0, autoclobber=True, serialize=False)


WAYS: dict[str, Callable[[str], object]] = {
    "migrate": migrate,
    "to one of them": lambda alias: migrate(alias, "0002"),
    "--fake": lambda alias: migrate(alias, fake=True),
    "sqlmigrate": sql,
    "all apps": lambda alias: call_command("migrate", database=alias, verbosity=0),
    "--skip-checks": lambda alias: migrate(alias, skip_checks=True),
    "without migrations": lambda alias: _without_migrations(alias),
    "tests": create_test_database,
}


def _without_migrations(alias: str) -> None:
    with override_settings(MIGRATION_MODULES={"pg_eventstream": None}):
        migrate_all = {"run_syncdb": True, "database": alias, "verbosity": 0}
        call_command("migrate", **migrate_all)


@pytest.mark.parametrize("routers", [[], ["Allows", "Silent"]], ids=str)
def test_database_that_is_not_postgresql_is_refused_and_unchanged(
    aliases: None, routers: list[str]
) -> None:
    with routed(*routers):
        for way, command in WAYS.items():
            with pytest.raises(CommandError) as refused:
                command("lite")
            assert "'lite' is not PostgreSQL" in str(refused.value), way
            assert OURS in str(refused.value)
            names = connections["lite"].introspection.table_names()
            assert [name for name in names if name != "django_migrations"] == []
            assert recorded("lite") == []


@pytest.mark.parametrize(
    ("routers", "guilty"),
    [
        (["Silent", "Denies", OURS], "Denies"),
        (["KnowsModels"], "KnowsModels"),
        (["KnowsNames", OURS], "KnowsNames"),
    ],
    ids=str,
)
def test_router_that_keeps_the_tables_out_is_named_and_nothing_recorded(
    aliases: None, routers: list[str], guilty: str
) -> None:
    with routed(*routers):
        problem = ""
        for way, command in WAYS.items():
            if way == "tests":
                continue
            if way == "without migrations" and guilty == "Denies":  # nothing would be recorded
                command("events")
                assert tables("events") == set()
                continue
            with pytest.raises(CommandError) as refused:
                command("events")
            problem = str(refused.value)
            assert "'events'" in problem, way
            assert f"{HERE}.{guilty} keeps" in problem
            assert OURS in problem
            assert tables("events") == set()
            assert recorded("events") == []
        messages = {message.id: message for message in check()}
    error = messages["pg_eventstream.E019"]
    assert f"{error.msg} {error.hint}" == problem


@pytest.mark.parametrize("routers", [[OURS, "Denies"], ["Silent", OURS, "Allows"]], ids=str)
def test_our_router_keeps_the_tables_in_their_database_alone(
    aliases: None, routers: list[str]
) -> None:
    with routed(*routers):
        assert check() == []
        migrate("lite")
        assert tables("lite") == set()
        migrate("lite", "zero")
        migrate("events")
        assert tables("events") == tables("default")
        assert recorded("events") == MIGRATIONS
        assert check(["default", "events", "lite"]) == []
        migrate("events", "0001")
        migrate("events", "zero")
        assert tables("events") == set()
        assert "CREATE TABLE" in sql("events")
        assert "CREATE TABLE" not in sql("lite")


def test_database_that_only_tests_would_migrate_is_warned_of(aliases: None) -> None:
    with routed():
        (message,) = check()
        assert message.id == "pg_eventstream.W007"
        assert "'lite'" in message.msg
        assert OURS in str(message.hint)


def test_tables_that_were_never_made_are_noticed_and_can_be_made(aliases: None) -> None:
    record("events", *MIGRATIONS)
    with routed(OURS):
        assert check() == []
        (message,) = check(["events"])
        assert message.id == "pg_eventstream.W022"
        with pytest.raises(CommandError) as refused:
            migrate("events", "zero")
        assert str(refused.value) == f"{message.msg} {message.hint}"
        assert recorded("events") == MIGRATIONS
        for command in re.findall(r"manage\.py migrate pg_eventstream ([^,.]*)", str(message.hint)):
            assert "--database events" in command
            migrate("events", *command.replace("--database events", "").split())
        assert tables("events") == tables("default")
        assert check(["events"]) == []


def test_later_migrations_say_so_when_the_first_were_only_recorded(aliases: None) -> None:
    record("events", *MIGRATIONS[:-1])
    with routed(OURS), pytest.raises(CommandError, match="recorded as applied"):
        migrate("events")
    assert recorded("events") == MIGRATIONS[:-1]


def test_record_in_the_wrong_database_can_be_removed(aliases: None) -> None:
    record("lite", *MIGRATIONS)
    with routed():
        with pytest.raises(CommandError, match="'lite' is not PostgreSQL"):
            migrate("lite", "zero")
        migrate("lite", "zero", fake=True)
    assert recorded("lite") == []
