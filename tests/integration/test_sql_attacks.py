"""Roles that try to do more than they were granted, and what happens."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from django.test import override_settings

from pg_eventstream.postgres.listener import BELL, NEWS
from pg_eventstream.postgres.locks import (
    BELL_LOCK,
    LEADER_LOCK,
    LOCK_SPACE,
    PRUNE_LOCK,
    SEQUENCE_LOCK,
)
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.publisher.pruner import Pruner
from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database
from tests.support.faults import wait_for_waiting
from tests.support.publisher_thread import running_publisher
from tests.support.roles import granted

INSERT = "INSERT INTO public.pg_eventstream_event (channel, data) VALUES ('c', 'x')"
SEQUENCE = "SELECT public.pg_eventstream_sequence()"


@pytest.fixture
def sender(database: Database) -> str:
    return granted(database, "sender")


def connect(database: Database, role: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(database.postgres.dsn(database.name, role), autocommit=True)


# Functions that run with their owner's rights

# Replaces everything that these functions use. A session that runs one of these is trapped.
_TABLES = """
    CREATE {temp} TABLE {trap}.pg_eventstream_outbox (
        xid xid8, seq bigserial, event_id bigint, channel varchar(255));
    CREATE {temp} TABLE {trap}.pg_eventstream_stream (
        position bigint, eid bigint, event_id bigint, sequenced_at timestamptz, channel varchar);
    CREATE {temp} TABLE {trap}.pg_eventstream_channel (name varchar(255), pruned bigint);
    CREATE {temp} TABLE {trap}.pg_eventstream_event (id bigint);
    CREATE {temp} TABLE {trap}.pg_eventstream_cursor (
        position bigint, snapshot pg_snapshot, cluster bigint);
"""
_FUNCTIONS = {
    "pg_current_xact_id()": "xid8",
    "pg_current_snapshot()": "pg_snapshot",
    "pg_control_system()": "bigint",
    "pg_notify(text, text)": "void",
    "current_setting(text, boolean)": "text",
    "pg_try_advisory_xact_lock_shared(int, int)": "boolean",
    "equal(varchar, varchar)": "boolean",
    "equal(varchar, text)": "boolean",
    "not_less(xid8, xid8)": "boolean",
    "plus(bigint, bigint)": "bigint",
}
_OPERATORS = {
    "=": ("varchar, varchar", "equal"),
    "<>": ("varchar, text", "equal"),
    ">=": ("xid8, xid8", "not_less"),
    "+": ("bigint, bigint", "plus"),
}


def set_trap(database: Database, role: str) -> None:
    """A schema of the role, with a trap for each name that could be looked up."""
    database.execute(f"CREATE SCHEMA trap AUTHORIZATION {role}")
    with connect(database, role) as connection:
        connection.execute(_TABLES.format(temp="", trap="trap"))
        for function, returned in _FUNCTIONS.items():
            connection.execute(
                f"CREATE FUNCTION trap.{function} RETURNS {returned} LANGUAGE plpgsql"
                " AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$"
            )
        for name, (operands, function) in _OPERATORS.items():
            left, right = operands.split(", ")
            connection.execute(
                f"CREATE OPERATOR trap.{name}"
                f" (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = trap.{function})"
            )


@pytest.mark.parametrize(("kind", "attempt"), [("sender", INSERT), ("sequencer", SEQUENCE)])
def test_nothing_that_a_role_puts_in_the_way_is_used(
    database: Database, kind: str, attempt: str
) -> None:
    role = granted(database, kind)
    set_trap(database, role)
    for path in ("trap, pg_catalog, public", "pg_catalog, trap", "pg_temp, trap, pg_catalog", "''"):
        database.send("c")
        with connect(database, role) as connection:
            connection.execute(_TABLES.format(temp="TEMP", trap="pg_temp"))
            connection.execute(f"SET search_path = {path}")
            connection.execute(attempt)
            for schema in ("trap", "pg_temp"):
                for table in ("outbox", "stream", "cursor"):
                    found = connection.execute(f"SELECT FROM {schema}.pg_eventstream_{table}")
                    assert found.fetchall() == []
    database.value(SEQUENCE)
    sent = 8 if attempt == INSERT else 4
    assert database.value("SELECT count(*) FROM pg_eventstream_stream") == sent


def test_each_function_keeps_to_its_schema_and_may_not_be_called(
    database: Database, sender: str
) -> None:
    functions = database.fetch(
        r"""
        SELECT proname, prosecdef,
               (SELECT path FROM unnest(proconfig) AS path WHERE path LIKE 'search_path=%%'),
               has_function_privilege(%s, oid, 'EXECUTE')
          FROM pg_proc WHERE proname LIKE 'pg\_eventstream%%' ORDER BY 1
        """,
        [sender],
    )
    pinned = "search_path=pg_catalog, public, pg_temp"
    assert functions == [
        ("pg_eventstream_consumer_page", False, pinned, False),
        # names the schema of everything that it uses
        ("pg_eventstream_enqueue", True, None, False),
        ("pg_eventstream_lock_checkpoints", False, pinned, False),
        ("pg_eventstream_move_checkpoints", False, pinned, False),
        ("pg_eventstream_sequence", True, pinned, False),
    ]


# A sender (test_sql_senders.py has what it is denied on the tables themselves)

DENIED = [
    "MERGE INTO pg_eventstream_event e USING (VALUES (1)) v (id) ON e.id = v.id"
    " WHEN MATCHED THEN DELETE",
    "INSERT INTO pg_eventstream_event (id, channel, data) OVERRIDING SYSTEM VALUE"
    " VALUES (9223372036854775807, 'c', '')",
    "INSERT INTO pg_eventstream_event (id, channel, data) OVERRIDING USER VALUE"
    " VALUES (1, 'c', '')",
    "INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', '') RETURNING ctid, xmin",
    "INSERT INTO pg_eventstream_event (channel, data)"
    " SELECT channel, data FROM pg_eventstream_event",
    "COPY pg_eventstream_event FROM STDIN",
    "COPY (SELECT data FROM pg_eventstream_event) TO STDOUT",
    "COPY pg_eventstream_event (channel, data) FROM PROGRAM 'echo'",
    "COPY pg_eventstream_event (channel, data) FROM '/etc/passwd'",
    "TABLE pg_eventstream_event",
    "EXPLAIN SELECT data FROM pg_eventstream_event",
    "SELECT e FROM pg_eventstream_event e",
    "SELECT FROM pg_eventstream_event",
    "DECLARE own CURSOR FOR SELECT data FROM pg_eventstream_event",
    "SELECT * FROM own_view",
    "SELECT * FROM own_function()",
    "SELECT * FROM pg_eventstream_event_id_seq",
    "SELECT currval('pg_eventstream_event_id_seq')",
    "SELECT nextval('pg_eventstream_outbox_seq_seq')",
    "SELECT setval('pg_eventstream_event_id_seq', 9223372036854775807)",
    "CREATE TABLE trap.own (id bigint REFERENCES pg_eventstream_event)",
    "CREATE TABLE trap.own () INHERITS (pg_eventstream_event)",
    "CREATE RULE own AS ON INSERT TO pg_eventstream_event DO INSTEAD NOTHING",
    "CREATE POLICY own ON pg_eventstream_event",
    "CREATE INDEX ON pg_eventstream_event (data)",
    "CREATE STATISTICS own ON channel, data FROM pg_eventstream_event",
    "COMMENT ON TABLE pg_eventstream_event IS ''",
    "GRANT SELECT ON pg_eventstream_event TO CURRENT_USER",
    "ALTER TABLE pg_eventstream_event ADD COLUMN own int DEFAULT 1",
    "ALTER TABLE pg_eventstream_event OWNER TO CURRENT_USER",
    "ALTER TABLE pg_eventstream_event SET UNLOGGED",
    "ALTER SEQUENCE pg_eventstream_event_id_seq RESTART",
    "ALTER FUNCTION pg_eventstream_enqueue() OWNER TO CURRENT_USER",
    "REINDEX TABLE pg_eventstream_event",
    "CLUSTER pg_eventstream_event USING pg_eventstream_event_pkey",
    "DROP TABLE pg_eventstream_outbox",
    "DROP FUNCTION pg_eventstream_enqueue() CASCADE",
    "CREATE FUNCTION public.own() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "SET ROLE postgres",
    "SET SESSION AUTHORIZATION postgres",
    "ALTER ROLE CURRENT_USER SUPERUSER",
    "SET session_replication_role = replica",
    "SET lo_compat_privileges = on",
    "CREATE EVENT TRIGGER own ON ddl_command_end EXECUTE FUNCTION own_trigger()",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'",
]


def test_sender_has_no_way_around_what_it_may_do(database: Database, sender: str) -> None:
    database.send("c", "somebody else's")
    database.execute(f"CREATE SCHEMA trap AUTHORIZATION {sender}; ANALYZE pg_eventstream_event")
    outcomes = {}
    # The default since PostgreSQL 15, and what migrations/README.md tells to do before.
    database.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    with connect(database, sender) as connection, database.connect():  # which it could terminate
        old = connection.info.server_version < 150000  # does not know MERGE
        connection.execute(
            """
            SET search_path = public, trap;
            CREATE VIEW trap.own_view AS SELECT data FROM pg_eventstream_event;
            CREATE FUNCTION trap.own_function() RETURNS SETOF text LANGUAGE sql
                SECURITY DEFINER AS 'SELECT data FROM pg_eventstream_event';
            CREATE FUNCTION trap.own_trigger() RETURNS event_trigger LANGUAGE plpgsql
                AS 'BEGIN END';
            """
        )
        for statement in DENIED:
            if old and statement.startswith("MERGE"):
                continue
            try:
                connection.execute(f"BEGIN; {statement}")
                outcomes[statement] = "allowed"
            except psycopg.errors.InsufficientPrivilege:
                pass
            except psycopg.Error as e:
                outcomes[statement] = repr(e)
            connection.execute("ROLLBACK")
        assert outcomes == {}
        # The planner and the statistics reveal nothing of the columns either.
        stats = "SELECT count(*) FROM pg_stats WHERE tablename LIKE 'pg\\_eventstream%'"
        assert connection.execute(stats).fetchone() == (0,)
        connection.execute(INSERT)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT lastval()")  # nor the id of its own event
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 2


def test_when_an_event_says_it_was_created_is_nothing_to_the_retention(database: Database) -> None:
    """Nor how it is numbered; but only the owner can set either."""
    rows = [(-(2**63), "-infinity"), (2**63 - 1, "infinity"), (0, "2000-01-01"), (-1, "9999-12-31")]
    for n, created in rows:
        database.execute(
            "INSERT INTO pg_eventstream_event (id, channel, data, created)"
            " VALUES (%s, 'c', '', %s)",
            [n, created],
        )
    assert database.value(SEQUENCE) == len(rows)
    with database.connect() as connection, override_settings(GRIP_URL=None):
        assert Pruner(connection).run_once() == 0
        old = "UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '25 hours'"
        connection.execute(f"{old} WHERE eid <= 3")
        assert Pruner(connection).run_once() == 3
    assert database.fetch("SELECT id FROM pg_eventstream_event") == [(-1,)]


# Any role that may connect


@pytest.fixture
def stranger(database: Database) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A session of a role without any privilege on the objects of this package."""
    role = f"stranger_{database.name}"
    database.execute(f"CREATE ROLE {role} LOGIN")
    with connect(database, role) as connection:
        yield connection
    database.execute(f"DROP ROLE {role}")


def test_who_listens_learns_that_something_was_sent_and_nothing_else(
    database: Database, stranger: psycopg.Connection[tuple[object, ...]]
) -> None:
    for channel in (BELL, NEWS):
        stranger.execute(f"LISTEN {channel}")
    database.send("secret channel", "secret")
    database.value(SEQUENCE)
    heard = list(stranger.notifies(timeout=10, stop_after=2))
    assert sorted((n.channel, n.payload) for n in heard) == [(BELL, ""), (NEWS, "")]


def test_who_takes_the_lock_of_the_sweep_keeps_it_from_pruning_until_the_session_ends(
    database: Database, stranger: psycopg.Connection[tuple[object, ...]]
) -> None:
    with database.connect() as connection:
        connection.execute(INSERT)
        connection.execute(SEQUENCE)
        connection.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '9 d'")
        stranger.execute(f"SELECT pg_advisory_lock({LOCK_SPACE}, {PRUNE_LOCK})")
        connection.execute("SET lock_timeout = '100ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            Pruner(connection).run_once()
        connection.execute(INSERT)  # does not wait
        assert connection.execute(SEQUENCE).fetchone() == (1,)
        stranger.close()
        connection.execute("SET lock_timeout = '20s'")
        assert Pruner(connection).run_once() == 1


@override_settings(GRIP_URL=None, EVENTSTREAM_SAFETY_POLL=1.0)
def test_who_takes_the_locks_delays_events_until_the_session_ends_and_does_nothing_else(
    database: Database,
    stranger: psycopg.Connection[tuple[object, ...]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")

    def sequenced(count: int) -> None:
        query = "SELECT count(*) FROM pg_eventstream_stream"
        wait_until(lambda: bool(database.value(query) == count), timeout=20)

    def send(count: int) -> None:
        with database.connect(options="-c lock_timeout=1s") as sender:
            for _ in range(count):
                sender.execute(INSERT)

    def take(lock: int) -> None:
        stranger.execute(f"SELECT pg_advisory_lock({LOCK_SPACE}, {lock})")

    def doorbell_is(publisher: Publisher, state: str) -> bool:
        return publisher._doorbell is not None and publisher._doorbell.state.value == state

    take(LEADER_LOCK)
    take(BELL_LOCK)
    with running_publisher() as publisher:
        send(3)  # does not wait
        wait_until(lambda: "standing by" in caplog.text, timeout=20)
        assert publisher._doorbell is None
        assert database.value("SELECT count(*) FROM pg_eventstream_stream") == 0
        stranger.execute(f"SELECT pg_advisory_unlock({LOCK_SPACE}, {LEADER_LOCK})")
        sequenced(3)
        send(3)  # notifies no publisher, but meets one that cannot sleep without the lock
        sequenced(6)
        stranger.execute("SELECT pg_advisory_unlock_all()")
        wait_until(lambda: doorbell_is(publisher, "asleep"), timeout=20)
        take(BELL_LOCK)
        send(3)  # notifies no publisher either; the safety poll finds them
        sequenced(9)
        take(SEQUENCE_LOCK)
        send(3)
        wait_for_waiting(database, "leader")
        sequenced(9)
        stranger.execute(f"SELECT pg_advisory_unlock({LOCK_SPACE}, {SEQUENCE_LOCK})")
        sequenced(12)
        # A notification without a reason or with a payload wakes it up and does nothing else.
        stranger.execute("SELECT pg_notify(%s, repeat('x', 7999))", [BELL])
        stranger.execute("SELECT pg_notify(%s, E'\\x01''; %%s')", [NEWS])
        send(1)
        sequenced(13)
    eids = database.fetch("SELECT eid FROM pg_eventstream_stream ORDER BY position")
    assert [eid for (eid,) in eids] == list(range(1, 14))
