"""Sessions of this package work with any settings of the role or the database."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from io import StringIO

import psycopg
import pytest
from django.core.management import call_command
from django.db import InternalError, connections
from django.test import override_settings

from pg_eventstream import get_events, send_event, subscribe
from pg_eventstream.management.importing import import_events
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.postgres.sequence import sequence
from pg_eventstream.publisher.daemon import Publisher
from tests.support.database import Database
from tests.support.faults import locked
from tests.support.http_service import HttpService, body_of, respond

# Settings that are text, whose kind does not show which values are hostile.
TEXTS = {
    "DateStyle": ["German", "SQL, DMY", "Postgres, MDY"],
    "TimeZone": ["Asia/Kathmandu", "<odd>-05:30:15", "Africa/Monrovia"],
    "client_encoding": ["LATIN1", "SQL_ASCII", "EUC_JP"],
    "search_path": ['nowhere, "$user", public, pg_temp, pg_catalog'],
    "lc_messages": ["C"],
    "plpgsql.extra_errors": ["all"],
    "plpgsql.extra_warnings": ["all"],
    "plpgsql.variable_conflict": ["use_variable", "use_column"],
    "restrict_nonsystem_relation_kind": ["view, foreign-table"],
}
# Settings that limit a session's resources on purpose, or make a server very slow.
LEFT_OUT = (
    "^(log_|debug_(print|discard|deadlocks)|trace_|backtrace_|temp_file_limit|max_stack_depth|"
    "zero_damaged_pages|ignore_system_indexes|allow_system_table_mods|ignore_checksum_failure)"
)


def settings_of_roles(database: Database) -> Iterator[tuple[str, str]]:
    """All settings of a role, with each value that could be hostile."""
    database.execute("LOAD 'plpgsql'")
    rows = database.fetch(
        "SELECT name, vartype, reset_val, min_val, enumvals, unit FROM pg_settings"
        " WHERE context IN ('user', 'superuser', 'backend', 'superuser-backend') AND name !~ %s",
        [LEFT_OUT],
    )
    for name, kind, usual, least, values, unit in rows:
        if name in TEXTS:
            hostile = TEXTS[name]
        elif kind == "bool":
            hostile = ["off" if usual == "on" else "on"]
        elif kind == "enum":
            hostile = [value for value in values if value != usual]
        elif kind in ("integer", "real"):
            # 0 mostly means none.
            hostile = ["200"] if unit == "ms" and least == "0" else [least]
        else:
            hostile = []
        yield from ((name, value) for value in hostile)


class Role:
    """A role that may do everything here, and its settings in the test's database."""

    def __init__(self, database: Database) -> None:
        #: The role's name, and the name of its alias in ``DATABASES``.
        self.name = f"role_{database.name}"
        self.dsn = database.postgres.dsn(database.name, self.name)
        self._database = database

    def set(self, name: str, value: str) -> bool:
        """Set it for the role. Returns whether that is possible at all."""
        # A list, such as search_path, is not a string.
        quoted = value if "," in value and "$" in value else f"'{value}'"
        quoted_name = ".".join(f'"{part}"' for part in name.split("."))
        statement = (
            f"ALTER ROLE {self.name} IN DATABASE {self._database.name} SET {quoted_name} = {quoted}"
        )
        try:
            self._database.execute(statement)
        except psycopg.Error as e:
            logging.getLogger(__name__).info("%s = %s: %s", name, value, e)
            return False
        return True

    def reset(self) -> None:
        self._database.execute(
            f"ALTER ROLE {self.name} IN DATABASE {self._database.name} RESET ALL"
        )


@pytest.fixture
def role(database: Database) -> Iterator[Role]:
    role = Role(database)
    database.execute(f"CREATE ROLE {role.name} LOGIN IN ROLE postgres")
    connections.settings[role.name] = {**connections.settings["default"], "USER": role.name}
    try:
        with override_settings(EVENTSTREAM_DATABASE=role.name):
            yield role
    finally:
        connections.close_all()
        del connections.settings[role.name]
        role.reset()
        database.execute(f"DROP ROLE {role.name}")


class Proxy(HttpService):
    """Accepts everything and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = b""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.taken += body_of(request)
        respond(request, 200)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as service:
        yield service


@pytest.fixture
def old_tables(database: Database) -> None:
    """The tables of django-eventstream that `import_events` reads."""
    database.execute(
        "CREATE TABLE django_eventstream_event (id serial PRIMARY KEY, channel text, type text,"
        " data text, eid bigint, created timestamptz DEFAULT now())"
    )
    database.execute(
        "CREATE TABLE django_eventstream_eventcounter (id serial PRIMARY KEY, name text,"
        " value bigint)"
    )


def everything_works(database: Database, proxy: Proxy, role: Role, channel: str) -> None:
    """Publish, stream, prune and import as this role."""
    text = f'"{channel}日本"'
    sessions = Connector(role.name, f"{role.dsn}?connect_timeout=5")
    with override_settings(GRIP_URL=proxy.url):
        database.send(channel, text)
        assert Publisher(sessions).run_once() >= 1
    assert channel.encode() in proxy.taken

    async def follow() -> list[str]:
        got = []
        async for event in subscribe([channel], "earliest"):
            got.append(event.data)
            if len(got) == 1:
                await asyncio.to_thread(database.send, channel, '"live"')
            else:
                break
        return got

    assert asyncio.run(asyncio.wait_for(follow(), 60)) == [text, '"live"']
    assert get_events([channel]).last_event_id == f"{channel}:2"

    database.execute(
        "INSERT INTO django_eventstream_event (channel, type, data, eid)"
        " VALUES (%s, 'message', %s, 7)",
        [f"old-{channel}", '"\\"日本\\""'],
    )
    database.execute(
        "INSERT INTO django_eventstream_eventcounter (name, value) VALUES (%s, 7)",
        [f"old-{channel}"],
    )
    with Connector(role.name).connect("import") as connection:
        assert import_events("default", connection).events == 1
    assert get_events([f"old-{channel}"], "earliest").events[0].data == '"日本"'

    with override_settings(EVENTSTREAM_RETENTION=0.000001):
        call_command("eventstream_prune", stdout=StringIO())
    assert database.value("SELECT count(*) FROM pg_eventstream_stream") == 0


def test_everything_works_with_any_settings_of_the_role(
    database: Database, role: Role, proxy: Proxy, old_tables: None, channel: str
) -> None:
    """With all settings at once. Of several values, the last one is used."""
    possible = {name for name, value in settings_of_roles(database) if role.set(name, value)}
    assert len(possible) > 100
    assert {
        "array_nulls", "client_encoding", "default_transaction_read_only", "DateStyle",
        "default_transaction_isolation", "idle_session_timeout", "session_replication_role",
    } <= possible  # fmt: skip
    # The application's own sessions keep their settings.
    for kind in ("statement", "transaction", "lock", "idle_session", "idle_in_transaction_session"):
        if f"{kind}_timeout" in possible:
            role.set(f"{kind}_timeout", "20s")
    everything_works(database, proxy, role, channel)


@pytest.mark.thorough
@pytest.mark.timeout(1200)
def test_everything_works_with_each_setting_of_the_role_alone(
    database: Database, role: Role, proxy: Proxy, old_tables: None, channel: str
) -> None:
    failed = {}
    for n, (name, value) in enumerate(settings_of_roles(database)):
        if role.set(name, value):
            try:
                everything_works(database, proxy, role, f"{channel}-{n}")
            except Exception as e:  # noqa: BLE001  (all of them, in one run)
                failed[f"{name} = {value}"] = repr(e)
            connections[role.name].close()
            role.reset()
    assert failed == {}


def test_connection_outlasts_all_timeouts_of_the_role(database: Database, role: Role) -> None:
    """`transaction_timeout` is new in PostgreSQL 17."""
    names = [
        name
        for (name,) in database.fetch(
            "SELECT name FROM pg_settings"
            " WHERE name ~ '(statement|transaction|session|lock)_timeout$'"
        )
    ]
    assert len(names) >= 4
    for name in names:
        assert role.set(name, "250ms")
    with Connector(role.name).connect("test") as connection, ThreadPoolExecutor(1) as threads:
        connection.execute("SELECT pg_sleep(0.4)")
        time.sleep(0.4)
        with connection.transaction():
            connection.execute("SELECT 1")
            time.sleep(0.4)
        with locked(database, "LOCK TABLE pg_eventstream_cursor"):
            waiting = threads.submit(sequence, connection)
            time.sleep(0.4)
        assert waiting.result(20) == 0


def test_sequencing_takes_longer_than_a_transaction_of_the_role_may(
    database: Database, role: Role
) -> None:
    names = [name for name, _ in settings_of_roles(database) if name == "transaction_timeout"]
    for name in [*names, "statement_timeout"]:
        assert role.set(name, "20ms")
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data)"
        " SELECT 'c', '{}' FROM generate_series(1, 20000)"
    )
    assert Publisher(Connector(role.name)).run_once() == 0  # no proxy
    assert database.value("SELECT max(eid) FROM pg_eventstream_stream") == 20_000


def test_database_whose_encoding_says_nothing_is_read_as_utf8(database: Database) -> None:
    name = f"{database.name}_ascii"
    database.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    try:
        dsn = database.postgres.dsn(name)
        for encoding in ("", "?client_encoding=SQL_ASCII"):
            with Connector("default", f"{dsn}{encoding}").connect("test") as connection:
                row = connection.execute("SELECT 'a', '日本'::text, ARRAY['ü']").fetchone()
                assert row == ("a", "日本", ["ü"])
    finally:
        database.execute(f"DROP DATABASE {name} WITH (FORCE)")


# Settings that stay with the role or the caller


def test_sender_that_may_only_read_is_told_so_and_its_own_choice_stands(
    database: Database, role: Role
) -> None:
    role.set("default_transaction_read_only", "on")
    with pytest.raises(InternalError, match="read-only"):
        send_event("c", "message", 1, using=role.name)
    connections[role.name].close()
    role.set("statement_timeout", "12345")
    with connections[role.name].cursor() as cursor:
        cursor.execute("SHOW statement_timeout")
        assert cursor.fetchone() == ("12345ms",)


def test_sending_works_with_any_other_settings_of_the_role(
    database: Database, role: Role, channel: str
) -> None:
    theirs = {"default_transaction_read_only", "session_replication_role"}
    for name, value in settings_of_roles(database):
        if name not in theirs and not name.endswith("_timeout"):
            role.set(name, value)
    send_event(channel, "message", {"n": "日本"}, skip_user_ids=["NULL", 1], using=role.name)
    assert database.fetch("SELECT data, skip_user_ids FROM pg_eventstream_event") == [
        ('{"n": "\\u65e5\\u672c"}', ["NULL", "1"])
    ]
    assert database.value("SELECT count(*) FROM pg_eventstream_outbox") == 1
