"""With ``migrations/grants.sql`` each role can do its work and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from django.db import ProgrammingError

from pg_eventstream.consumers import checkpoints, consumer, declare
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.role_work import (
    await_consumer,
    consume,
    observe,
    prune_only,
    publish,
    send,
    sequence,
    serve,
)
from tests.support.roles import MAKE_OLD, MIGRATIONS, as_role, granted, run_file
from tests.support.stored_consumer import CONSUMER

_WORK = [
    "TRUNCATE pg_eventstream_proxy, pg_eventstream_report",
    "INSERT INTO pg_eventstream_event (channel, data) VALUES ('old', '')",
    "SELECT pg_eventstream_sequence()",
    MAKE_OLD,
    "INSERT INTO pg_eventstream_event (channel, data) VALUES ('new', '0'), ('new', '1')",
    "INSERT INTO pg_eventstream_proxy"
    " SELECT 'http://gone.example', max(position) FROM pg_eventstream_stream",
    "INSERT INTO pg_eventstream_publisher VALUES (1, 'host:1', now(), now())"
    " ON CONFLICT (id) DO UPDATE SET heartbeat = now()",
    "INSERT INTO pg_eventstream_report (name, content)"
    " VALUES ('publisher', jsonb_build_object('role', 'postgres'))",
]


@pytest.fixture
def work_to_do(database: Database, control: ControlPort) -> Callable[[], None]:
    """Creates work: something to sequence, publish, acknowledge, forget and prune."""

    late = consumer("late", start="earliest")(print)
    del declare._declared["late"]
    with database.connect() as connection:
        checkpoints.register(connection, late)

    def make() -> None:
        with database.connect() as connection:
            for statement in _WORK:
                connection.execute(statement)

    return make


def privileges(database: Database, role: str) -> list[tuple[str, str]]:
    """The grants of a role on the app's objects, as the text between GRANT and TO."""
    return database.fetch(
        """
        SELECT privilege_type, table_name FROM information_schema.role_table_grants
         WHERE grantee = %(role)s
        UNION ALL
        SELECT format('%%s (%%s)', privilege_type,
                      string_agg(column_name, ', ' ORDER BY column_name)), table_name
          FROM information_schema.role_column_grants AS c
         WHERE grantee = %(role)s AND NOT EXISTS (
               SELECT FROM information_schema.role_table_grants AS t
                WHERE t.grantee = c.grantee AND t.table_name = c.table_name
                  AND t.privilege_type = c.privilege_type)
         GROUP BY privilege_type, table_name
        UNION ALL
        SELECT privilege_type, format('FUNCTION %%I', routine_name)
          FROM information_schema.role_routine_grants
         WHERE grantee = %(role)s
         ORDER BY 2, 1
        """,
        {"role": role},
    )


@pytest.mark.parametrize(
    ("kind", "work", "expected"),
    [
        (
            "sender",
            send,
            {"event": "INSERT (channel, data, meta, skip_user_ids, type)"},
        ),
        (
            "endpoint",
            serve,
            {
                "event": "SELECT",
                "stream": "SELECT",
                "channel": "SELECT",
                "cursor": "SELECT",
                "publisher": "SELECT",
                "proxy": "SELECT",
            },
        ),
        ("sequencer", sequence, {"sequence": "EXECUTE"}),
        (
            "publisher",
            publish,
            {
                "event": "DELETE SELECT",
                "stream": "DELETE SELECT",
                "outbox": "DELETE SELECT",
                "cursor": "SELECT",
                "channel": "INSERT SELECT UPDATE",
                "report": "INSERT SELECT UPDATE",
                "publisher": "INSERT SELECT UPDATE",
                "proxy": "DELETE INSERT SELECT UPDATE",
                "sequence": "EXECUTE",
                "consumer": "SELECT",
                "checkpoint": "SELECT",
                "slot": "SELECT (consumer_id, lost, slot) UPDATE (lost)",
            },
        ),
        (
            "pruner",
            prune_only,
            {
                "event": "DELETE SELECT (created, id)",
                "stream": "DELETE SELECT",
                "outbox": "DELETE SELECT",
                "cursor": "SELECT",
                "channel": "INSERT SELECT UPDATE",
                "report": "INSERT SELECT UPDATE",
                "proxy": "SELECT",
                "consumer": "SELECT",
                "checkpoint": "SELECT",
                "slot": "SELECT (consumer_id, lost, slot) UPDATE (lost)",
            },
        ),
        (
            "consumer",
            consume,
            {
                "event": "SELECT",
                "stream": "SELECT",
                "cursor": "SELECT",
                "outbox": "SELECT (seq, xid)",
                "consumer": "INSERT SELECT UPDATE",
                "checkpoint": "DELETE INSERT SELECT UPDATE",
                "slot": "DELETE INSERT SELECT UPDATE",
                "parked": "DELETE INSERT SELECT UPDATE",
                "report": "INSERT SELECT UPDATE",
                "consumer_page": "EXECUTE",
                "lock_checkpoints": "EXECUTE",
                "move_checkpoints": "EXECUTE",
            },
        ),
        (
            "waiter",
            await_consumer,
            {
                "stream": "SELECT (channel, position)",
                "cursor": "SELECT",
                "outbox": "SELECT (seq, xid)",
                "consumer": "SELECT",
                "checkpoint": "SELECT",
                "slot": "SELECT (consumer_id, lost, slot)",
            },
        ),
        (
            "observer",
            observe,
            {
                "event": "SELECT (created, id)",
                "stream": "SELECT",
                "outbox": "SELECT",
                "cursor": "SELECT",
                "publisher": "SELECT",
                "proxy": "SELECT",
                "report": "SELECT",
                "consumer": "SELECT",
                "checkpoint": "SELECT",
                "slot": "SELECT",
                "parked": "SELECT (consumer_id)",
            },
        ),
    ],
)
def test_role_can_do_its_work_and_needs_each_of_its_grants(
    database: Database,
    work_to_do: Callable[[], None],
    kind: str,
    work: Callable[[str], Any],
    expected: dict[str, str],
) -> None:
    role = granted(database, kind)
    dsn = as_role(database, role)
    work_to_do()
    if kind == "observer":
        database.execute(
            "TRUNCATE pg_eventstream_consumer, pg_eventstream_checkpoint, pg_eventstream_slot"
        )
        database.execute(CONSUMER)
    work(dsn)
    held = privileges(database, role)
    found: dict[str, str] = {}
    for privilege, thing in held:
        name = thing.removeprefix("FUNCTION ").removeprefix("pg_eventstream_")
        found[name] = f"{found[name]} {privilege}" if name in found else privilege
    assert found == expected
    needless = []
    for privilege, thing in held:
        work_to_do()
        database.execute(f"REVOKE {privilege} ON {thing} FROM {role}")
        try:
            work(dsn)
        except (psycopg.errors.InsufficientPrivilege, ProgrammingError):
            pass  # the second is what Django makes of the first
        else:
            needless.append(f"{privilege} ON {thing}")
        database.execute(f"GRANT {privilege} ON {thing} TO {role}")
    assert needless == []


def test_grants_may_be_repeated_and_a_role_may_be_several(database: Database) -> None:
    for _ in range(2):
        role = granted(database, "sender", "endpoint")
    send(as_role(database, role))
    serve(as_role(database, role))


def test_grants_without_a_role_grant_nothing(database: Database) -> None:
    query = "SELECT count(*) FROM information_schema.table_privileges"
    before = database.value(query)
    run_file(database, MIGRATIONS / "grants.sql")
    assert database.value(query) == before
