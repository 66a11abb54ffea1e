"""Programs in other languages send by an INSERT, and their events arrive."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pg_eventstream.servers.processes import wait_until
from tests.support.bad_names import BAD_NAMES, CHECK_VIOLATION
from tests.support.database import Database
from tests.support.publisher import PublisherProcess
from tests.support.roles import granted, psql
from tests.support.sse_client import OpenStream


@pytest.fixture
def role(database: Database) -> str:
    return granted(database, "sender")


@pytest.fixture
def sender(database: Database, role: str) -> str:
    """The connection string of the role."""
    return database.postgres.dsn(database.name, role)


@dataclass(frozen=True)
class Result:
    """The result of one statement: no code if it succeeded."""

    code: str | None
    error: str
    constraint: str | None = None


@pytest.fixture
def node(node_directory: Path) -> Callable[[str, Sequence[Any]], list[Result]]:
    """Runs queries with Node's client and a connection string."""

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


# Delivery


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


@pytest.mark.parametrize("skip", ["ARRAY[NULL]::text[]", "ARRAY[['1', '2'], ['3', '4']]"])
def test_no_event_of_a_sender_delays_those_after_it(
    database: Database, sender: str, publisher: PublisherProcess, channel: str, skip: str
) -> None:
    with psycopg.connect(sender, autocommit=True) as connection:
        insert = "INSERT INTO pg_eventstream_event (channel, data, skip_user_ids)"
        # Either refused, with the name of the constraint, or published; but never in the way.
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
