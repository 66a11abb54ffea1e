"""SECURITY.md: everything that it names exists, and its SQL does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from pg_eventstream.postgres.locks import (
    BELL_LOCK,
    LEADER_LOCK,
    LOCK_SPACE,
    PRUNE_LOCK,
    SEQUENCE_LOCK,
)
from tests.support.database import Database
from tests.support.documentation import example
from tests.support.role_work import prune_only, sequence, serve
from tests.support.roles import as_role, granted, make_old

ROOT = Path(__file__).parents[2]
POLICY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
LOCKS = example("SECURITY.md", "FROM pg_locks").code
ROWS = example("SECURITY.md", "ENABLE ROW LEVEL SECURITY").code

LOCKS_TAKEN = (BELL_LOCK, LEADER_LOCK, SEQUENCE_LOCK, PRUNE_LOCK)


def test_every_file_that_it_names_is_there() -> None:
    named = set(re.findall(r"`(tests/[\w./]*)`|\]\((?!https?:)([^)#]+)\)", POLICY))
    assert len(named) > 10
    paths = [path or link for path, link in named]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_line_of_the_table_names_a_test() -> None:
    table = [line for line in POLICY.splitlines() if line.startswith("| ")][2:]
    assert len(table) > 10
    assert [line for line in table if not re.search(r"\| `tests/[\w/]+\.py`.* \|$", line)] == []


def test_it_shows_who_holds_the_locks(database: Database) -> None:
    with database.connect(application_name="the holder") as holder:
        for lock in LOCKS_TAKEN:
            holder.execute(f"SELECT pg_advisory_lock({LOCK_SPACE}, {lock})")
        pid = holder.info.backend_pid
        found = database.fetch(LOCKS)
    assert sorted(found) == [(pid, "postgres", "the holder", lock) for lock in LOCKS_TAKEN]


def test_row_level_security_keeps_a_sender_to_its_channels(database: Database) -> None:
    roles = {"billing": "sender", "web": "endpoint", "events": "publisher"}
    names = {name: granted(database, kind) for name, kind in roles.items()}
    to = {name: rf"\b(?<!-){name}\b(?!-)(?=[,\s])" for name in names}
    statements = ROWS
    for name, pattern in to.items():
        statements = re.sub(pattern, names[name], statements)
    database.execute(statements)
    sender = as_role(database, names["billing"])
    insert = "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, '')"
    with psycopg.connect(sender, autocommit=True) as connection:
        connection.execute(insert, ["billing-paid"])
        for channel in ("other", "billing", "pg_eventstream:permission"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(insert, [channel])
    publisher, endpoint = as_role(database, names["events"]), as_role(database, names["web"])
    sequence(publisher)
    with psycopg.connect(endpoint) as connection:
        found = connection.execute("SELECT channel FROM pg_eventstream_event").fetchall()
    assert found == [("billing-paid",)]
    serve(endpoint)
    make_old(database)
    prune_only(publisher)
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0
