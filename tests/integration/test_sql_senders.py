"""Senders without Python: psql and Node.js, as a role that may only INSERT."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from tests.support.bad_names import BAD_NAMES, CHECK_VIOLATION
from tests.support.database import Database
from tests.support.roles import granted, psql

ROOT = Path(__file__).parents[2]
TABLES = "event", "outbox", "stream", "channel", "cursor", "publisher", "proxy"
DENIED = "42501"  # insufficient_privilege


@pytest.fixture
def role(database: Database) -> str:
    return granted(database, "sender")


@pytest.fixture
def sender(database: Database, role: str) -> str:
    """The connection string of the role."""
    return database.postgres.dsn(database.name, role)


def test_statements_prepared_by_the_driver_keep_working(database: Database, sender: str) -> None:
    with psycopg.connect(sender, autocommit=True) as connection:
        for n in range(10):
            connection.execute(
                "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s)",
                ["c", str(n)],
                prepare=True,
            )
    assert database.fetch("SELECT data FROM pg_eventstream_event ORDER BY id") == [
        (str(n),) for n in range(10)
    ]


@pytest.mark.parametrize(
    "setting",
    [
        "SET pgtrigger.ignore = '{pgtrigger_enqueue_3f3f6}'",
        "SET CONSTRAINTS ALL IMMEDIATE",
        "SET search_path = pg_temp, public, pg_catalog",
        "SET default_transaction_isolation = 'serializable'",
        "SET check_function_bodies = off",
    ],
)
def test_no_setting_of_the_session_keeps_an_event_back(
    database: Database, sender: str, setting: str
) -> None:
    with psycopg.connect(sender) as connection:
        connection.execute(setting)
        for _ in range(2):
            connection.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', '')")
    assert database.value("SELECT pg_eventstream_sequence()") == 2


def test_prepared_transaction_counts_when_it_is_committed(database: Database, sender: str) -> None:
    with psycopg.connect(sender, autocommit=True) as connection:
        connection.execute("BEGIN")
        # PostgreSQL cannot prepare a transaction that has sent a notification.
        connection.execute("SET LOCAL pg_eventstream.bell = off")
        connection.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', '')")
        connection.execute(f"PREPARE TRANSACTION '{database.name}'")
        assert database.value("SELECT pg_eventstream_sequence()") == 0
        connection.execute(f"COMMIT PREPARED '{database.name}'")
    assert database.value("SELECT pg_eventstream_sequence()") == 1


# Errors say what is wrong


def test_psql_is_told_which_rule_a_bad_event_breaks(database: Database, role: str) -> None:
    for constraint, values in BAD_NAMES:
        done = psql(
            database,
            *("-v", "VERBOSITY=verbose", "-c"),
            "INSERT INTO pg_eventstream_event (data, channel, type)"
            f" VALUES ('fine', 'fine', 'fine'), ('bad', {values[1:]}",
            user=role,
        )
        assert done.returncode == 1
        assert f"ERROR:  {CHECK_VIOLATION}:" in done.stderr
        assert f'violates check constraint "{constraint}"' in done.stderr
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0
    assert database.value("SELECT pg_eventstream_sequence()") == 0


@pytest.mark.parametrize("column", ["channel", "type"])
def test_name_that_is_too_long_or_has_nul_is_refused(sender: str, column: str) -> None:
    with psycopg.connect(sender, autocommit=True) as connection:
        insert = "INSERT INTO pg_eventstream_event (channel, type, data) VALUES (%s, %s, '')"
        for name in ("c" * 256, "a\0b"):
            names = {"channel": "c", "type": "t", column: name}
            with pytest.raises(psycopg.DataError):
                connection.execute(insert, [names["channel"], names["type"]])
        connection.execute(insert, ["c" * 255, "ä" * 255])


# Senders can do nothing else


#: The statements of object-relational mappers to get the new id. SQLAlchemy 2.0: one, and several
#: at once.
ORMS = [
    "INSERT INTO pg_eventstream_event (channel, type, data) VALUES ('c'::VARCHAR, 't'::VARCHAR,"
    " 'd'::VARCHAR) RETURNING pg_eventstream_event.id",
    "INSERT INTO pg_eventstream_event (channel, type, data) SELECT p0::VARCHAR, p1::VARCHAR,"
    " p2::VARCHAR FROM (VALUES ('c'::VARCHAR, 't'::VARCHAR, 'd'::VARCHAR, 0)) AS"
    " imp_sen(p0, p1, p2, sen_counter) ORDER BY sen_counter"
    " RETURNING pg_eventstream_event.id, pg_eventstream_event.id AS id__1",
    # Rails and Ecto, Django
    """INSERT INTO "pg_eventstream_event" ("channel", "type", "data") VALUES ('c', 't', 'd')"""
    """ RETURNING "id\"""",
    """INSERT INTO "pg_eventstream_event" ("channel", "type", "data") VALUES ('c', 't', 'd')"""
    """ RETURNING "pg_eventstream_event"."id\"""",
]
NOT_FOR_ORMS = [
    "INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', 'd') RETURNING id, type",
    "INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', 'd') RETURNING *",
    "SELECT id, data FROM pg_eventstream_event",
    "INSERT INTO pg_eventstream_event (id, channel, data) VALUES (DEFAULT, 'c', 'd')",
    "DELETE FROM pg_eventstream_event WHERE id = 1",
]


GRANTS_FOR_ORMS = [
    "docs/how-to/sending-from-sql.md",
    "migrations/README.md",
    "migrations/grants.sql",
]


def test_orm_that_reads_the_new_id_needs_the_additional_grant(
    database: Database, role: str, sender: str
) -> None:
    written = {
        re.sub(r"\bbilling\b", role, grant)
        for path in GRANTS_FOR_ORMS
        for grant in re.findall(r"GRANT SELECT [^;`]* TO billing", (ROOT / path).read_text())
    }
    assert len(written) == 1
    with psycopg.connect(sender, autocommit=True) as connection:

        def refused() -> list[str]:
            found = []
            for statement in (*ORMS, *NOT_FOR_ORMS):
                try:
                    connection.execute(statement)
                except psycopg.errors.InsufficientPrivilege:
                    found.append(statement)
            return found

        assert refused() == [*ORMS, *NOT_FOR_ORMS]
        database.execute(written.pop())
        assert refused() == NOT_FOR_ORMS
    assert database.value("SELECT pg_eventstream_sequence()") == len(ORMS)


def forbidden_statements() -> list[str]:
    key = {
        "channel": "name",
        "cursor": "position",
        "proxy": "name",
        "publisher": "id",
        "stream": "position",
        "outbox": "xid",
        "event": "id",
    }
    return [
        *(
            statement.format(table=f"pg_eventstream_{table}", key=key[table])
            for table in TABLES
            for statement in [
                "SELECT count(*) FROM {table}",
                "SELECT {key} FROM {table}",
                "SELECT FROM {table} FOR UPDATE",
                "UPDATE {table} SET {key} = {key}",
                "DELETE FROM {table}",
                "TRUNCATE {table}",
                "LOCK TABLE {table} IN ACCESS SHARE MODE",
                "COPY {table} TO STDOUT",
                "COPY {table} FROM STDIN",
                "CREATE TRIGGER own AFTER INSERT ON {table} EXECUTE FUNCTION"
                " suppress_redundant_updates_trigger()",
                "ALTER TABLE {table} DISABLE TRIGGER ALL",
                "CREATE TEMP TABLE own (LIKE {table})",
                "INSERT INTO {table} DEFAULT VALUES",
            ]
            # The right to one column is enough for this; it fails because the channel is missing.
            if not (table == "event" and "DEFAULT VALUES" in statement)
        ),
        # an event that never existed, existed at another time, or belongs to another sender
        "INSERT INTO pg_eventstream_event (id, channel, data) VALUES (1, 'c', '')",
        "INSERT INTO pg_eventstream_event (channel, data, created) VALUES ('c', '', now())",
        "INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', '')"
        " ON CONFLICT (id) DO UPDATE SET data = ''",
        "INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', '') RETURNING data",
        "COPY pg_eventstream_event (id, channel, data) FROM STDIN",
        "INSERT INTO pg_eventstream_outbox (xid, event_id, channel)"
        " VALUES (pg_current_xact_id(), 1, 'c')",
        "INSERT INTO pg_eventstream_stream (position, eid, event_id, channel)"
        " VALUES (1, 1, 1, 'c')",
        "SELECT nextval('pg_eventstream_event_id_seq')",
        "SELECT setval('pg_eventstream_outbox_seq_seq', 1)",
        # the functions
        "SELECT pg_eventstream_sequence()",
        "SELECT pg_eventstream_enqueue()",
        "CREATE TRIGGER own AFTER INSERT ON own_table FOR EACH ROW"
        " EXECUTE FUNCTION pg_eventstream_enqueue()",
        "CREATE CONSTRAINT TRIGGER own AFTER INSERT ON own_table DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION pg_eventstream_enqueue()",
        "ALTER FUNCTION pg_eventstream_enqueue() RESET search_path",
        "CREATE OR REPLACE FUNCTION public.pg_eventstream_sequence() RETURNS bigint"
        " LANGUAGE sql AS 'SELECT 1'",
        "DROP TRIGGER pgtrigger_enqueue_3f3f6 ON pg_eventstream_event",
        "SET session_replication_role = replica",
    ]


def test_sender_may_only_insert_events(database: Database, sender: str) -> None:
    database.send("c", "somebody else's")
    database.execute("SELECT pg_eventstream_sequence()")
    outcomes = {}
    with psycopg.connect(sender) as connection:
        connection.execute("CREATE TEMP TABLE own_table (id bigint, channel text)")
        connection.commit()
        for statement in forbidden_statements():
            try:
                # COPY is refused before it reads data.
                connection.execute(statement)
                outcomes[statement] = "allowed"
            except psycopg.Error as e:
                outcomes[statement] = e.sqlstate or repr(e)
            connection.rollback()
    assert len(outcomes) > 100
    assert {s: outcome for s, outcome in outcomes.items() if outcome != DENIED} == {}
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 1
