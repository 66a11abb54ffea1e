"""Senders that are not Python: psql and Node.js, as a role that may INSERT and no more."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database
from tests.support.publisher import PublisherProcess
from tests.support.roles import granted, psql
from tests.support.sse_client import OpenStream

ROOT = Path(__file__).parents[2]
NODE = ROOT / "tests" / "node"
TABLES = "event", "outbox", "stream", "channel", "cursor", "publisher", "proxy"
DENIED = "42501"  # insufficient_privilege
CHECK_VIOLATION = "23514"

BAD_NAMES = [
    ("pg_eventstream_channel_not_empty_no_cr_no_lf", "('', 'message')"),
    ("pg_eventstream_channel_not_empty_no_cr_no_lf", "(E'a\\rb', 'message')"),
    ("pg_eventstream_channel_not_empty_no_cr_no_lf", "(E'a\\nb', 'message')"),
    ("pg_eventstream_channel_not_empty_no_cr_no_lf", "(E'a\\n', 'message')"),
    ("pg_eventstream_type_not_empty_no_cr_no_lf", "('c', '')"),
    ("pg_eventstream_type_not_empty_no_cr_no_lf", "('c', E'\\rb')"),
    ("pg_eventstream_type_not_empty_no_cr_no_lf", "('c', E'a\\n\\nid: 7')"),
]


@pytest.fixture
def role(database: Database) -> str:
    return granted(database, "sender")


@pytest.fixture
def sender(database: Database, role: str) -> str:
    """The connection string of the role."""
    return database.postgres.dsn(database.name, role)


@dataclass(frozen=True)
class Result:
    """What became of one statement: no code, if it succeeded."""

    code: str | None
    error: str
    constraint: str | None = None


@pytest.fixture
def node(node_directory: Path) -> Callable[[str, Sequence[Any]], list[Result]]:
    """Runs queries with Node's client, given a connection string."""

    def run(dsn: str, queries: Sequence[Any]) -> list[Result]:
        done = subprocess.run(
            ["node", "sender.js", dsn],
            input=json.dumps(queries),
            cwd=node_directory,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [
            Result(result.get("code"), result.get("error", ""), result.get("constraint"))
            for result in json.loads(done.stdout)
        ]

    return run


# They arrive


def test_what_psql_inserts_arrives(
    database: Database, role: str, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    script = rf"""
        INSERT INTO pg_eventstream_event (channel, type, data)
        VALUES ('{channel}', 'greeting', 'plain text, 100 %');

        INSERT INTO pg_eventstream_event (channel, data)
        SELECT '{channel}', jsonb_build_object('n', n, 'text', 'ä ' || chr(10))
          FROM generate_series(1, 2) AS n;

        BEGIN;
        INSERT INTO pg_eventstream_event (channel, data) VALUES ('{channel}', 'rolled back');
        ROLLBACK;

        PREPARE send (text, jsonb) AS
            INSERT INTO pg_eventstream_event (channel, data) VALUES ($1, $2);
        EXECUTE send ('{channel}', '{{"prepared": true}}');

        COPY pg_eventstream_event (channel, type, data, skip_user_ids) FROM STDIN;
{channel}	copied	first line\nsecond line	{{1,2}}
{channel}	copied	a\\b	{{}}
\.
    """
    done = psql(database, "-v", "ON_ERROR_STOP=1", user=role, script=script)
    assert (done.returncode, done.stderr) == (0, "")
    events = client.wait_count(6)
    assert [(event.type, event.data) for event in events] == [
        ("greeting", "plain text, 100 %"),
        ("message", '{"n": 1, "text": "ä \\n"}'),
        ("message", '{"n": 2, "text": "ä \\n"}'),
        ("message", '{"prepared": true}'),
        ("copied", "first line\nsecond line"),
        ("copied", "a\\b"),
    ]
    assert [event.eids[channel] for event in events] == [1, 2, 3, 4, 5, 6]


def test_what_node_inserts_arrives(
    sender: str,
    node: Callable[[str, Sequence[Any]], list[Result]],
    publisher: PublisherProcess,
    stream: OpenStream,
    channel: str,
) -> None:
    client = stream(channel).wait_open()
    insert = "INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids)"
    prepared = {"name": "send", "text": f"{insert} VALUES ($1, $2, $3, $4)"}
    results = node(
        sender,
        [
            {**prepared, "values": [channel, "first", "plain text", []]},
            {**prepared, "values": [channel, "second", json.dumps({"ä": "\n"}), ["1", "b,c"]]},
            {
                "text": f"{insert} VALUES ($1, 'third', jsonb_build_object('n', $2::int), '{{}}')",
                "values": [channel, 3],
            },
            {"text": f"{insert} VALUES ($1, 'json', $2::jsonb, '{{}}')", "values": [channel, {}]},
            "BEGIN",
            {**prepared, "values": [channel, "rolled back", "{}", []]},
            "ROLLBACK",
            {**prepared, "values": [channel, "last", "", []]},
        ],
    )
    assert [result for result in results if result.code] == []
    assert [(event.type, event.data) for event in client.wait_count(5)] == [
        ("first", "plain text"),
        ("second", '{"\\u00e4": "\\n"}'),
        ("third", '{"n": 3}'),
        ("json", "{}"),
        ("last", ""),
    ]


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
        # PostgreSQL prepares no transaction that has sent a notification.
        connection.execute("SET LOCAL pg_eventstream.bell = off")
        connection.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', '')")
        connection.execute(f"PREPARE TRANSACTION '{database.name}'")
        assert database.value("SELECT pg_eventstream_sequence()") == 0
        connection.execute(f"COMMIT PREPARED '{database.name}'")
    assert database.value("SELECT pg_eventstream_sequence()") == 1


@pytest.mark.parametrize("skip", ["ARRAY[NULL]::text[]", "ARRAY[['1', '2'], ['3', '4']]"])
def test_no_event_of_a_sender_holds_up_those_behind_it(
    database: Database, sender: str, publisher: PublisherProcess, channel: str, skip: str
) -> None:
    with psycopg.connect(sender, autocommit=True) as connection:
        insert = "INSERT INTO pg_eventstream_event (channel, data, skip_user_ids)"
        # Either refused, with the name of the rule, or published; but not in the way for ever.
        with contextlib.suppress(psycopg.errors.CheckViolation):
            connection.execute(f"{insert} VALUES ('{channel}', 'odd', {skip})")
        connection.execute(f"{insert} VALUES ('{channel}', 'even', '{{}}')")
    wait_until(
        lambda: database.value(
            """
            SELECT (SELECT max(position) FROM pg_eventstream_proxy)
                 = (SELECT max(s.position) FROM pg_eventstream_stream s
                      JOIN pg_eventstream_event e ON e.id = s.event_id AND e.data = 'even')
            """
        ),
        timeout=10,
    )


# They are told what is wrong


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


def test_node_is_told_which_rule_a_bad_event_breaks(
    database: Database, sender: str, node: Callable[[str, Sequence[Any]], list[Result]]
) -> None:
    results = node(
        sender,
        [
            f"INSERT INTO pg_eventstream_event (data, channel, type) VALUES ('bad', {values[1:]}"
            for _, values in BAD_NAMES
        ],
    )
    assert [(result.code, result.constraint) for result in results] == [
        (CHECK_VIOLATION, constraint) for constraint, _ in BAD_NAMES
    ]
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0


@pytest.mark.parametrize("column", ["channel", "type"])
def test_name_that_is_too_long_or_has_nul_is_refused(sender: str, column: str) -> None:
    with psycopg.connect(sender, autocommit=True) as connection:
        insert = "INSERT INTO pg_eventstream_event (channel, type, data) VALUES (%s, %s, '')"
        for name in ("c" * 256, "a\0b"):
            names = {"channel": "c", "type": "t", column: name}
            with pytest.raises(psycopg.DataError):
                connection.execute(insert, [names["channel"], names["type"]])
        connection.execute(insert, ["c" * 255, "ä" * 255])


# They can do nothing else


#: What object-relational mappers send to get the new id. SQLAlchemy 2.0: one, and several at once.
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


def test_orm_that_asks_for_the_new_id_needs_the_grant_that_is_written_beside_the_other(
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
            # One column of the event is enough to be allowed this; it fails for want of a channel.
            if not (table == "event" and "DEFAULT VALUES" in statement)
        ),
        # an event that never was, or not then, or that is another's
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


def test_sender_may_do_nothing_but_insert_events(database: Database, sender: str) -> None:
    database.send("c", "somebody else's")
    database.execute("SELECT pg_eventstream_sequence()")
    outcomes = {}
    with psycopg.connect(sender) as connection:
        connection.execute("CREATE TEMP TABLE own_table (id bigint, channel text)")
        connection.commit()
        for statement in forbidden_statements():
            try:
                # COPY is refused before any data is asked for.
                connection.execute(statement)
                outcomes[statement] = "allowed"
            except psycopg.Error as e:
                outcomes[statement] = e.sqlstate or repr(e)
            connection.rollback()
    assert len(outcomes) > 100
    assert {s: outcome for s, outcome in outcomes.items() if outcome != DENIED} == {}
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 1
