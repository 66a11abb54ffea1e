"""The plain SQL of ``migrations/`` gives the same schema as Django, safely in any schema."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path

import psycopg
import pytest
from django.core.management import call_command
from django.db import connections
from django.test import override_settings
from psycopg import sql

from migrations import generate
from pg_eventstream.servers.postgres import Postgres
from tests.support import forked
from tests.support.database import Database
from tests.support.environment import child_environment
from tests.support.roles import MIGRATIONS, granted, psql, run_file

NewDatabase = Callable[..., Database]
OTHER_SCHEMA = 'Events, "quoted"'


@pytest.fixture
def new_database(postgres: Postgres) -> Iterator[NewDatabase]:
    """Creates empty databases, whose search_path is one schema."""
    made: list[str] = []

    def make(schema: str = "public") -> Database:
        name = f"test_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        made.append(name)
        database = Database(postgres, name)
        with database.connect() as connection:
            quoted = sql.Identifier(schema)
            connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(quoted))
            connection.execute(
                sql.SQL("ALTER DATABASE {} SET search_path = {}").format(
                    sql.Identifier(name), quoted
                )
            )
        return database

    yield make
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        for name in made:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def granted_nothing(database: Database) -> str:
    role = "role_owner"
    database.execute(f"DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN")
    return role


@contextmanager
def as_default(database: Database, user: str = "postgres") -> Iterator[None]:
    """Use it as Django's database for a while."""
    address = connections["default"].settings_dict
    before = {name: address[name] for name in ("NAME", "USER")}
    connections.close_all()
    address.update(NAME=database.name, USER=user)
    try:
        yield
    finally:
        connections.close_all()
        address.update(before)


def migrate_by_django(
    database: Database, *target: str, user: str = "postgres", fake: bool = False
) -> None:
    with as_default(database, user):
        # Only this app, whose migrations depend on no other app.
        call_command("migrate", "pg_eventstream", *target, fake=fake, verbosity=0)


def migrate_by_psql(database: Database, user: str = "postgres") -> None:
    for name in generate.names():
        run_file(database, MIGRATIONS / f"{name}.sql", user=user)


class NoMigrations:
    """The value of MIGRATION_MODULES with ``pytest --nomigrations``."""

    def __contains__(self, app_label: str) -> bool:
        return True

    def __getitem__(self, app_label: str) -> None:
        return None


def create_without_migrations(database: Database, **settings: object) -> None:
    settings = {"MIGRATION_MODULES": NoMigrations(), **settings}
    with as_default(database), override_settings(**settings):
        call_command("migrate", run_syncdb=True, verbosity=0)


def schema_of(database: Database) -> str:
    """Everything in a database except the tables of other apps, as pg_dump writes it."""
    dump = subprocess.run(
        [
            str(database.postgres.program("pg_dump")),
            *("--schema-only", "--exclude-table=(django|auth|app)_*", database.dsn),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    # A random key that is different in each dump.
    return re.sub(r"^\\(un)?restrict .*\n", "", dump, flags=re.MULTILINE)


@pytest.mark.parametrize("name", generate.names())
def test_sql_file_says_what_the_migration_says(database: Database, name: str) -> None:
    assert (MIGRATIONS / f"{name}.sql").read_text(encoding="utf-8") == generate.render(name), (
        "out of date: python -m migrations.generate"
    )


@pytest.mark.parametrize("schema", ["public", OTHER_SCHEMA])
def test_psql_and_django_make_the_same_schema(new_database: NewDatabase, schema: str) -> None:
    by_psql, by_django = new_database(schema), new_database(schema)
    migrate_by_psql(by_psql)
    migrate_by_django(by_django)
    expected = schema_of(by_django)
    assert schema_of(by_psql) == expected
    # Assert that it is the right dump, with everything important in it.
    assert expected.count("CREATE TABLE") == 12
    assert expected.count("SECURITY DEFINER") == 2
    assert len(re.findall(r" ON FUNCTION .* FROM PUBLIC;", expected)) == 5
    assert expected.count("CREATE CONSTRAINT TRIGGER") == 1


@pytest.mark.parametrize(
    "schema",
    ["public", pytest.param(OTHER_SCHEMA, marks=[pytest.mark.faults, pytest.mark.thorough])],
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"MIGRATION_MODULES": {"pg_eventstream": None}},
        {"MIGRATION_MODULES": {"pg_eventstream": "tests.support.node"}},  # which has no migrations
        {"PGTRIGGER_INSTALL_ON_MIGRATE": True},
        {"PGTRIGGER_SCHEMA_EDITOR": False},
        {"PGTRIGGER_MIGRATIONS": False},
    ],
)
def test_database_created_without_migrations_has_the_same_schema_and_rows(
    new_database: NewDatabase, schema: str, settings: dict[str, object]
) -> None:
    migrated, created = new_database(schema), new_database(schema)
    migrate_by_django(migrated)
    create_without_migrations(created, **settings)
    assert schema_of(created) == schema_of(migrated)
    for database in (migrated, created):
        database.send("c", "sent")
        assert database.value("SELECT pg_eventstream_sequence()") == 1
    counts = "SELECT count(*) FROM pg_eventstream_cursor"
    assert created.value(counts) == migrated.value(counts)
    create_without_migrations(created, **settings)  # running it again changes nothing
    assert schema_of(created) == schema_of(migrated)
    assert created.value("SELECT count(*) FROM pg_eventstream_event") == 1


def test_only_databases_that_hold_the_tables_get_them_without_migrations(
    new_database: NewDatabase,
) -> None:
    database = new_database()
    create_without_migrations(database, DATABASE_ROUTERS=[f"{__name__}.NotHere"])
    assert not re.findall(r"^CREATE .*pg_eventstream.*", schema_of(database), re.MULTILINE)


class NotHere:
    """A router that keeps the tables of this app out."""

    def allow_migrate(self, db: str, app_label: str, **hints: object) -> bool | None:
        return False if app_label == "pg_eventstream" else None


_TEST_THAT_SENDS = """
from django.test import TransactionTestCase
from django.db import connection
from pg_eventstream import send_event

class SendTest(TransactionTestCase):
    def test_send(self):
        for n in range(2):
            send_event("c", "message", n)
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_eventstream_sequence()")
                self.assertEqual(cursor.fetchone(), (1,))

    test_send_once_more = test_send
"""


@pytest.mark.parametrize(
    "setting",
    ["DATABASES['default']['TEST'] = {'MIGRATE': False}", "MIGRATION_MODULES = Nothing()"],
)
def test_manage_py_test_creates_its_databases_with_migrations_switched_off(
    database: Database, tmp_path: Path, setting: str
) -> None:
    (tmp_path / "test_settings.py").write_text(
        "from tests.project.settings import *\n"
        f"DATABASES['default']['NAME'] = {database.name!r}\n"
        "class Nothing:\n"
        "    __contains__ = lambda self, label: True\n"
        "    __getitem__ = lambda self, label: None\n"
        f"{setting}\n"
    )
    (tmp_path / "test_send.py").write_text(_TEST_THAT_SENDS)
    done = forked.run(
        [sys.executable, "-m", "django", "test", "--settings=test_settings"],
        directory=tmp_path,
        environment=child_environment(PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}"),
    )
    assert done.returncode == 0, done.stderr
    assert "Ran 2 tests" in done.stderr


def test_sql_file_is_applied_as_a_whole_or_not_at_all(new_database: NewDatabase) -> None:
    database = new_database()
    # Conflicts with one of the last statements.
    database.execute("CREATE TABLE pg_eventstream_proxy_name_d6ab13e9_like ()")
    before = schema_of(database)
    done = psql(database, "-f", str(MIGRATIONS / "0001_initial.sql"))
    assert "already exists" in done.stderr
    assert schema_of(database) == before


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"DEFAULT_AUTO_FIELD": "django.db.models.AutoField"},
        {"PGTRIGGER_SCHEMA": "elsewhere"},
    ],
)
def test_models_and_migrations_agree_in_every_project(
    database: Database, settings: dict[str, str]
) -> None:
    out = StringIO()
    with override_settings(**settings), suppress(SystemExit):
        call_command("makemigrations", "pg_eventstream", check=True, stdout=out)
    assert out.getvalue() == "No changes detected in app 'pg_eventstream'\n"


@pytest.mark.parametrize("migrate", [migrate_by_psql, migrate_by_django])
def test_owner_needs_no_rights_outside_of_the_schema(
    new_database: NewDatabase, migrate: Callable[..., None]
) -> None:
    database = new_database("events")
    role = granted_nothing(database)
    database.execute(f"ALTER SCHEMA events OWNER TO {role}")
    migrate(database, user=role)
    assert database.fetch(
        """
        SELECT DISTINCT relnamespace::regnamespace::text, relowner::regrole::text FROM pg_class
         WHERE relname LIKE 'pg_eventstream%'
        """
    ) == [("events", role)]
    database.send("c")
    assert database.value("SELECT pg_eventstream_sequence()") == 1


def test_migration_can_be_reversed_and_applied_again(new_database: NewDatabase) -> None:
    database = new_database()
    migrate_by_django(database)
    forward = schema_of(database)
    migrate_by_django(database, "zero")
    assert not re.findall(r"^CREATE .*pg_eventstream.*", schema_of(database), re.MULTILINE)
    migrate_by_django(database)
    assert schema_of(database) == forward


def test_django_takes_over_what_psql_has_made(new_database: NewDatabase) -> None:
    database = new_database()
    migrate_by_psql(database)
    before = schema_of(database)
    migrate_by_django(database, generate.names()[-1], fake=True)
    migrate_by_django(database)
    assert schema_of(database) == before
    assert database.fetch("SELECT name FROM django_migrations ORDER BY id") == [
        (name,) for name in generate.names()
    ]


@pytest.mark.parametrize("migrate", [migrate_by_psql, migrate_by_django])
@pytest.mark.parametrize("schema", ["public", OTHER_SCHEMA])
def test_functions_find_their_tables_in_the_schema_that_they_were_created_in(
    new_database: NewDatabase, schema: str, migrate: Callable[[Database], None]
) -> None:
    database = new_database(schema)
    migrate(database)
    with database.connect() as connection:
        connection.execute("CREATE SCHEMA elsewhere")
        quoted = sql.Identifier(schema).as_string(connection)
        connection.execute("SET search_path = elsewhere")
        connection.execute(
            f"INSERT INTO {quoted}.pg_eventstream_event (channel, data) VALUES ('c', '')"
        )
        called = connection.execute(f"SELECT {quoted}.pg_eventstream_sequence()")
        assert called.fetchone() == (1,)


@pytest.mark.parametrize("schema", ["public", OTHER_SCHEMA])
def test_sender_cannot_divert_the_trigger(new_database: NewDatabase, schema: str) -> None:
    database = new_database(schema)
    migrate_by_psql(database)
    role = granted(database, "sender")
    # A schema of the sender with tables and functions that imitate the real ones, before the real
    # schema and even before the system's.
    database.execute(f"CREATE SCHEMA trap AUTHORIZATION {role}")
    with psycopg.connect(database.postgres.dsn(database.name, role)) as connection:
        path = connection.execute("SHOW search_path").fetchone()
        assert path is not None
        for where in ("pg_temp", "trap"):
            connection.execute(
                f"CREATE TABLE {where}.pg_eventstream_outbox"
                " (xid xid8, seq bigint, event_id bigint, channel text)"
            )
            connection.execute(
                f"""
                CREATE FUNCTION {where}.pg_current_xact_id() RETURNS xid8
                LANGUAGE sql AS $$ SELECT '3'::xid8 $$
                """
            )
            connection.execute(
                f"""
                CREATE FUNCTION {where}.pg_try_advisory_xact_lock_shared(int, int)
                RETURNS boolean LANGUAGE plpgsql AS
                $$ BEGIN RAISE 'called as %', current_user; END $$;
                CREATE FUNCTION {where}.current_setting(text, boolean)
                RETURNS text LANGUAGE plpgsql AS
                $$ BEGIN RAISE 'called as %', current_user; END $$;
                CREATE FUNCTION {where}.pg_notify(text, text)
                RETURNS void LANGUAGE plpgsql AS
                $$ BEGIN RAISE 'called as %', current_user; END $$;
                CREATE FUNCTION {where}.differs(text, text)
                RETURNS boolean LANGUAGE plpgsql AS
                $$ BEGIN RAISE 'called as %', current_user; END $$;
                CREATE OPERATOR {where}.<> (
                    LEFTARG = text, RIGHTARG = text, FUNCTION = {where}.differs);
                CREATE DOMAIN {where}.regclass AS pg_catalog.text;
                CREATE DOMAIN {where}.int4 AS pg_catalog.text
                """
            )
        connection.execute(f"SET search_path = pg_temp, trap, pg_catalog, {path[0]}")
        connection.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', 'real')")
        connection.commit()
        for where in ("pg_temp", "trap"):
            diverted = connection.execute(f"SELECT count(*) FROM {where}.pg_eventstream_outbox")
            assert diverted.fetchone() == (0,)
    assert database.value("SELECT pg_eventstream_sequence()") == 1
    assert database.fetch(
        "SELECT s.channel, s.eid, e.data FROM pg_eventstream_stream s"
        " JOIN pg_eventstream_event e ON e.id = s.event_id"
    ) == [("c", 1, "real")]


def test_sequencing_cannot_be_diverted_by_its_caller(new_database: NewDatabase) -> None:
    database = new_database(OTHER_SCHEMA)
    migrate_by_psql(database)
    database.send("c", "real")
    role = granted(database, "publisher")
    database.execute(f"CREATE SCHEMA trap AUTHORIZATION {role}")
    with psycopg.connect(database.postgres.dsn(database.name, role), autocommit=True) as connection:
        function = "pg_eventstream_sequence"
        schema = sql.Identifier(OTHER_SCHEMA).as_string(connection)
        for where in ("pg_temp", "trap"):
            for table in ("cursor", "outbox", "stream", "event", "channel"):
                connection.execute(
                    f"CREATE TABLE {where}.pg_eventstream_{table}"
                    f" (LIKE {schema}.pg_eventstream_{table})"
                )
            connection.execute(
                f"""
                CREATE FUNCTION {where}.pg_current_snapshot() RETURNS pg_snapshot
                LANGUAGE plpgsql AS $$ BEGIN RAISE 'called as %', current_user; END $$
                """
            )
        connection.execute("SET search_path = pg_temp, trap, pg_catalog")
        assert connection.execute(f"SELECT {schema}.{function}()").fetchone() == (1,)
    assert database.fetch("SELECT channel, eid FROM pg_eventstream_stream") == [("c", 1)]
