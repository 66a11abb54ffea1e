"""The state that is read from the tables agrees with what the publisher and the pruner do."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from django.test import override_settings

from pg_eventstream import conf, send_event
from pg_eventstream.consumers import checkpoints, consumer, declare
from pg_eventstream.grip.proxy import Proxy
from pg_eventstream.limits import Limits
from pg_eventstream.operate.state import MOST_COUNTED, ProxyState, State, read_state
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher import daemon
from pg_eventstream.publisher.pruner import Pruner
from pg_eventstream.servers.processes import wait_until
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.publisher_thread import running_publisher
from tests.support.roles import as_role, make_old
from tests.support.rounds import publish_once

SEQUENCE = "SELECT pg_eventstream_sequence()"
INSERT = "INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', '')"
MANY = (
    "INSERT INTO pg_eventstream_event (channel, data)"
    " SELECT 'c' || n % 3, '' FROM generate_series(1, {}) AS n"
)


def test_new_database(database: Database) -> None:
    state = read_state()
    assert state.database.startswith(f"{database.name}@")
    assert (state.position, state.waiting.count, state.waiting.oldest_seconds) == (0, 0, None)
    assert (state.leader, state.publisher, state.heartbeat_seconds) == (None, None, None)
    assert (state.problems, state.unreadable, state.unseen, state.proxies) == ([], [], 0, [])
    assert state.listens
    assert not state.is_standby
    assert abs(state.clock_seconds) < 5
    assert len(state.tables) == 12


def test_waiting_events_are_those_that_the_next_call_puts_in_order(database: Database) -> None:
    """Whichever transactions were open when the calls before looked."""
    chance = random.Random(1)
    sessions = [database.connect(autocommit=False) for _ in range(5)]
    found = []
    with database.connect() as sequencer:
        for _ in range(25):
            session = chance.choice(sessions)
            session.execute(INSERT)
            if chance.random() < 0.4:
                (session.commit if chance.random() < 0.8 else session.rollback)()
            if chance.random() < 0.5:
                expected = read_state().waiting.count
                row = sequencer.execute(SEQUENCE).fetchone()
                assert row == (expected,)
                found.append(expected)
                assert read_state().waiting.count == 0
    for session in sessions:
        session.close()
    assert len(set(found)) > 2


def test_events_of_a_backlog_wait_until_their_slice_is_in_order(database: Database) -> None:
    with database.connect(autocommit=False) as late:
        late.execute(INSERT)
        database.execute(MANY.format(52_000))
        assert read_state().waiting.count == MOST_COUNTED
        assert database.value(SEQUENCE) == 50_000
        assert read_state().waiting.count == 2000
        # It has a lower number than all that are sequenced, and comes after the backlog.
        late.execute("SET CONSTRAINTS ALL IMMEDIATE")
        late.commit()
    assert read_state().waiting.count == 2001
    assert database.value(SEQUENCE) == 2000
    assert read_state().waiting.count == 1
    assert database.value(SEQUENCE) == 1
    state = read_state()
    assert (state.position, state.waiting.count) == (52_001, 0)


def test_age_of_the_oldest_waiting_event_is_since_its_commit(database: Database) -> None:
    for seconds in (100, 300, 200):
        database.send("c")
        database.execute(
            "UPDATE pg_eventstream_outbox SET committed_at = now() - make_interval(secs => %s)"
            " WHERE committed_at > now() - interval '9 s'",
            [seconds],
        )
    assert 300 <= (read_state().waiting.oldest_seconds or 0) < 330
    # An older trigger did not write it.
    database.execute("UPDATE pg_eventstream_outbox SET committed_at = NULL")
    database.execute("UPDATE pg_eventstream_event SET created = now() - interval '500 s'")
    assert 500 <= (read_state().waiting.oldest_seconds or 0) < 530


def test_what_waits_in_a_restored_database_is_unknown_until_it_is_used(database: Database) -> None:
    database.send("c")
    database.execute(SEQUENCE)
    database.send("c")
    database.execute("UPDATE pg_eventstream_cursor SET cluster = 1")
    state = read_state()
    assert (state.waiting.count, state.unseen) == (None, None)
    database.execute(SEQUENCE)
    assert read_state().waiting.count == 0


def proxy_state(name: str) -> ProxyState:
    return next(proxy for proxy in read_state().proxies if proxy.name == name)


def test_lag_counts_what_is_committed_and_not_only_what_is_sequenced(
    database: Database, control: ControlPort
) -> None:
    name = control.url
    assert proxy_state(name) == ProxyState(
        name=name, configured=True, position=None, lag_events=None, lag_seconds=None
    )
    database.send("c")
    publish_once()
    assert (proxy_state(name).lag_events, proxy_state(name).lag_seconds) == (0, 0)
    database.send("c")
    database.execute("UPDATE pg_eventstream_outbox SET committed_at = now() - interval '60 s'")
    waits = proxy_state(name)
    assert (waits.position, waits.lag_events) == (1, 1)
    assert 60 <= (waits.lag_seconds or 0) < 90
    database.execute(SEQUENCE)
    database.send("c")
    lag = proxy_state(name)
    assert (lag.position, lag.lag_events) == (1, 2)
    assert 60 <= (lag.lag_seconds or 0) < 90
    publish_once()
    assert (proxy_state(name).lag_events, proxy_state(name).lag_seconds) == (0, 0)


def test_lag_of_a_proxy_counts_in_the_present_stream(
    database: Database, control: ControlPort
) -> None:
    """A position of a stream that was lost says nothing about what the proxy has of this one."""
    for _ in range(3):
        database.send("c")
    publish_once()
    database.execute(
        "UPDATE pg_eventstream_cursor SET incarnation = incarnation + 1000000000000, began = 2"
    )
    assert (proxy_state(control.url).position, proxy_state(control.url).lag_events) == (2, 1)


def test_proxy_that_only_the_publisher_has_is_shown_as_not_configured(database: Database) -> None:
    with database.connect() as session:
        daemon.register(session, "me", [Proxy({"control_uri": "http://127.0.0.1:1"})])
    (found,) = read_state().proxies
    assert (found.name, found.configured, found.reachable) == ("http://127.0.0.1:1", False, None)


def test_proxies_are_asked_whether_they_accept_a_batch(
    database: Database, control: ControlPort
) -> None:
    def ask() -> ProxyState:
        return read_state(ask_proxies=True).proxies[0]

    assert (ask().reachable, ask().answer) == (True, None)
    control.answers = [401]
    refused = ask()
    assert refused.reachable is False
    assert "check iss and key in GRIP_URL" in (refused.answer or "")
    control.answers = [400]  # as some do for an empty batch
    assert ask().reachable
    with override_settings(GRIP_URL="http://127.0.0.1:1"):
        assert "cannot be reached" in (ask().answer or "")
    assert read_state().proxies[0].reachable is None
    assert control.items == []


def wait_for(condition: Callable[[State], object]) -> None:
    wait_until(lambda: bool(condition(read_state())), timeout=20, check=0.05)


def test_leader_standbys_and_what_the_leader_reports(
    database: Database, control: ControlPort
) -> None:
    limits = Limits(heartbeat=0.1, standby=0.1)
    with (
        override_settings(GRIP_PREFIX="mine-", EVENTSTREAM_SAFETY_POLL=60),
        running_publisher(limits) as leader,
    ):
        wait_for(lambda state: state.leader and state.report)
        with running_publisher(limits):
            wait_for(lambda state: len(state.standbys) == 1)
            state = read_state()
            assert state.leader is not None
            assert (state.leader.name, state.publisher) == (leader.name, leader.name)
            assert state.may_sequence
            assert state.report == {
                **state.report,
                "listens": True,
                "safety_poll": 60.0,
                "grip_prefix": "mine-",
                "role": "postgres",
                "proxies": {control.url: {"trouble": None}},
            }
            # It takes a few rounds before it sleeps.
            wait_for(lambda state: state.awake is False)
            control.answers = [503] * 1000
            database.send("c")
            wait_for(lambda state: "answered 503" in (state.proxies[0].trouble or ""))
            control.answers = []
            wait_for(lambda state: state.proxies[0].trouble is None)
    wait_for(lambda state: state.leader is None and state.awake is None)


@pytest.mark.parametrize("safety_poll", [None, 3600])
def test_heart_of_a_publisher_that_sleeps_for_long_beats_without_sequencing(
    database: Database, safety_poll: float | None
) -> None:
    with (
        override_settings(EVENTSTREAM_SAFETY_POLL=safety_poll),
        running_publisher(Limits(heartbeat=0.05)) as publisher,
    ):
        wait_for(lambda state: state.awake is False)
        doorbell = publisher._doorbell
        assert doorbell is not None
        wait_until(lambda: doorbell.state.value == "asleep", timeout=20)
        deadline = time.monotonic() + 20
        with database.connect(autocommit=False) as silent:
            silent.execute("SET LOCAL pg_eventstream.bell = off")
            silent.execute(INSERT)
            silent.commit()
        began = heartbeat = database.value("SELECT heartbeat FROM pg_eventstream_publisher")
        while (heartbeat - began).total_seconds() < 0.2:
            heartbeat = database.value("SELECT heartbeat FROM pg_eventstream_publisher")
            assert time.monotonic() < deadline
        assert read_state().waiting.count == 1
        send_event("c", "message", 1)  # rings
        wait_for(lambda state: state.waiting.count == 0 and state.position == 2)


def test_unseen_events_are_found_among_the_newest(database: Database) -> None:
    database.execute(MANY.format(2000))
    assert read_state().unseen == 0  # they wait
    database.execute(SEQUENCE)
    assert read_state().unseen == 0
    with database.connect() as session:
        session.execute("SET session_replication_role = replica")
        session.execute(MANY.format(7))
    assert read_state().unseen == 7
    database.execute(MANY.format(100))
    database.execute(SEQUENCE)
    assert read_state().unseen == 7


def test_events_of_a_long_transaction_are_not_taken_for_unseen(database: Database) -> None:
    """They have low keys, and places above all events that were sent in the meantime."""
    with database.connect(autocommit=False) as long:
        long.execute(MANY.format(6000))
        database.execute(MANY.format(10))
        database.execute(SEQUENCE)
        long.commit()
    database.execute(SEQUENCE)
    assert read_state().unseen == 0


def test_imported_events_are_not_taken_for_unseen(database: Database) -> None:
    database.execute(MANY.format(10))
    database.execute(SEQUENCE)
    database.execute("UPDATE pg_eventstream_stream SET position = position - 10 WHERE position < 6")
    database.execute(
        "INSERT INTO pg_eventstream_channel SELECT channel, 1 FROM pg_eventstream_stream"
        " ON CONFLICT DO NOTHING"
    )
    database.execute(MANY.format(4000))
    database.execute(SEQUENCE)
    database.execute("SELECT setval('pg_eventstream_event_id_seq', 500)")
    assert read_state().unseen == 0


def test_pruning_is_behind_if_an_event_that_is_due_is_still_there(database: Database) -> None:
    pruning = read_state().pruning
    assert (pruning.ran_seconds, pruning.oldest_seconds, pruning.behind_seconds) == (None, None, 0)
    database.execute(MANY.format(10))
    database.execute(SEQUENCE)
    make_old(database)
    pruning = read_state().pruning
    assert 86_400 <= pruning.behind_seconds < 87_000
    with database.connect() as session:
        Pruner(session).run_once()
        pruning = read_state().pruning
        assert (pruning.ran_seconds or 0) < 60
        assert (pruning.oldest_seconds, pruning.behind_seconds) == (None, 0)
        database.execute(MANY.format(10))
        session.execute(SEQUENCE)
        assert 0 <= (read_state().pruning.oldest_seconds or -1) < 60


def test_what_a_consumer_holds_is_not_behind(database: Database) -> None:
    late = consumer("late")(lambda event: None)
    try:
        with database.connect() as session:
            checkpoints.register(session, late)
            database.execute(MANY.format(10))
            database.execute(SEQUENCE)
            make_old(database)
            pruning = read_state().pruning
            assert (pruning.oldest_seconds or 0) > 2 * 86_400 - 1
            assert pruning.behind_seconds == 0
            with override_settings(EVENTSTREAM_CONSUMER_HOLD=1.5 * 86_400):
                assert 43_100 <= read_state().pruning.behind_seconds < 43_800
            with override_settings(EVENTSTREAM_CONSUMER_HOLD=60):
                assert 86_300 <= read_state().pruning.behind_seconds < 87_000
            session.execute("UPDATE pg_eventstream_checkpoint SET position = 10")
            assert 86_300 <= read_state().pruning.behind_seconds < 87_000
    finally:
        del declare._declared["late"]


def test_events_that_no_proxy_has_are_not_due(database: Database, control: ControlPort) -> None:
    database.send("c")
    database.execute(SEQUENCE)
    make_old(database)
    with database.connect() as session:
        daemon.register(session, "me", [Proxy(conf.conf.grip_proxies[0])])
        session.execute("UPDATE pg_eventstream_proxy SET position = 0")
    pruning = read_state().pruning
    assert (pruning.oldest_seconds or 0) > 86_400
    assert pruning.behind_seconds == 0


def test_what_holds_vacuum_back(database: Database) -> None:
    database.send("c")
    assert read_state().oldest_transaction is None
    with database.connect(autocommit=False, application_name="report") as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1")
        for _ in range(3):
            database.send("c")
        found = read_state().oldest_transaction
        assert found is not None
        assert (found.kind, found.name) == ("session", f"{old.info.backend_pid} (report)")
        assert found.transactions >= 3
        assert 0 <= (found.seconds or -1) < 60
        old.rollback()
        old.execute("INSERT INTO auth_group (name) VALUES ('a')")
        old.execute("PREPARE TRANSACTION 'half a commit'")
        old.commit()
    database.send("c")
    found = read_state().oldest_transaction
    assert found is not None
    assert (found.kind, found.name) == ("prepared transaction", "half a commit")
    database.execute("ROLLBACK PREPARED 'half a commit'")


def test_publisher_of_another_database_of_the_server_is_seen(database: Database) -> None:
    other = database.postgres.dsn("postgres")
    with Connector("default", other).connect("leader"):
        assert read_state().elsewhere == ["postgres"]


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        ("ALTER TABLE pg_eventstream_event DISABLE TRIGGER ALL", "pg_eventstream.E021"),
        ("DROP FUNCTION pg_eventstream_sequence()", "pg_eventstream.E020"),
        ("DROP TABLE pg_eventstream_report", "pg_eventstream.I001"),
        (
            "DELETE FROM django_migrations WHERE name = '0009_stream_committed_at'",
            "pg_eventstream.I001",
        ),
    ],
)
def test_state_is_read_where_something_is_missing(
    database: Database, break_it: str, problem: str
) -> None:
    database.execute(break_it)
    state = read_state()
    assert [found.id for found in state.problems] == [problem]
    assert state.unreadable == []


def test_state_is_read_without_any_table(database: Database) -> None:
    database.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    state = read_state()
    assert [found.id for found in state.problems] == ["pg_eventstream.I001"]
    assert state.unreadable == ["outbox", "publisher", "proxy"]
    assert (state.position, state.waiting.count, state.proxies) == (0, None, [])


def test_role_without_rights_sees_what_everybody_sees(database: Database) -> None:
    database.execute("DO $$ BEGIN CREATE ROLE stranger LOGIN; EXCEPTION WHEN duplicate_object"
                     " THEN END $$")  # fmt: skip
    database.send("c")
    state = read_state(Connector("default", as_role(database, "stranger")))
    assert state.unreadable == ["outbox", "publisher", "proxy"]
    assert (state.waiting.count, state.unseen, state.publisher) == (None, None, None)
    assert state.server_version
    assert len(state.tables) == 12
    # All but the numbers that were drawn for events.
    tables = "event, stream, outbox, cursor, publisher, proxy".replace(", ", ", pg_eventstream_")
    database.execute(f"GRANT SELECT ON pg_eventstream_{tables} TO stranger")
    state = read_state(Connector("default", as_role(database, "stranger")))
    assert (state.unreadable, state.waiting.count, state.unseen) == ([], 1, None)
    database.execute("DROP OWNED BY stranger")
