"""Some types of events are reserved for the server, which reports on the stream by them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import psycopg
import pytest
from django.core.management import call_command
from django.db import connections

from pg_eventstream import InvalidEvent, asend_event, get_events, send_event, send_events, subscribe
from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database
from tests.support.origin import Origin, behind_a_proxy
from tests.support.reserved_types import CONSTRAINT, TYPES, send_as_before
from tests.support.rounds import sequence

#: An EventSource compares types exactly.
OTHERS = ["Stream-Error", "stream-error ", " keep-alive", "stream-closed", "error", "open"]


@pytest.mark.parametrize("event_type", TYPES)
def test_no_sender_may_use_the_types_of_the_server(database: Database, event_type: str) -> None:
    refused_by_name = f"'{event_type}' is reserved.*another"
    with pytest.raises(InvalidEvent, match=refused_by_name):
        send_event("c", event_type, 1)
    with pytest.raises(InvalidEvent, match=refused_by_name):
        asyncio.run(asend_event("c", event_type, 1))
    with pytest.raises(InvalidEvent, match=refused_by_name):
        send_events([("c", "message", 1), ("c", event_type, 1)])
    with pytest.raises(psycopg.errors.CheckViolation) as refused:
        database.execute(
            "INSERT INTO pg_eventstream_event (channel, type, data) VALUES ('c', %s, '')",
            [event_type],
        )
    assert refused.value.diag.constraint_name == CONSTRAINT
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0


def test_types_that_only_look_like_these_are_events_like_others(database: Database) -> None:
    for event_type in OTHERS:
        send_event("c", event_type, 1)
    sequence(database)
    with behind_a_proxy:
        body = Origin().open("c", last_event_id="earliest").body
    assert [f"event: {event_type}\n" in body for event_type in OTHERS] == [True] * len(OTHERS)


def test_programs_read_what_is_stored(database: Database) -> None:
    send_as_before(database, "c")
    sequence(database)
    wanted = ["message", *TYPES, "message"]
    assert [event.type for event in get_events(["c"], "earliest").events] == wanted

    async def follow() -> list[str]:
        types: list[str] = []
        async for event in subscribe(["c"], "earliest"):
            types.append(event.type)
            if event.eid == len(wanted):
                break
        return types

    assert asyncio.run(asyncio.wait_for(follow(), 30)) == wanted


@pytest.fixture
def before(database: Database) -> Any:
    call_command("migrate", "pg_eventstream", "0001", verbosity=0)
    connections.close_all()
    return database


def test_old_events_of_such_a_type_do_not_hinder_the_migration(before: Database) -> None:
    for event_type in TYPES:
        before.execute(
            "INSERT INTO pg_eventstream_event (channel, type, data) VALUES ('c', %s, '')",
            [event_type],
        )
    call_command("migrate", "pg_eventstream", "0002", verbosity=0)
    with pytest.raises(InvalidEvent):
        send_event("c", "stream-error", 1)
    state = before.value("SELECT convalidated FROM pg_constraint WHERE conname = %s", [CONSTRAINT])
    assert state is False


def test_migration_lets_senders_pass_while_it_waits_for_one_of_them(before: Database) -> None:
    def migrate() -> None:
        call_command("migrate", "pg_eventstream", "0002", verbosity=0)
        connections.close_all()

    with before.connect(autocommit=False) as slow:
        slow.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('slow', '')")
        migration = threading.Thread(target=migrate)
        migration.start()
        wait_until(
            lambda: before.value(
                "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND database ="
                " (SELECT oid FROM pg_database WHERE datname = current_database()))"
            ),
            timeout=30,
        )
        with before.connect() as sender:
            sender.execute("SET lock_timeout = '20s'")
            for n in range(30):
                sender.execute(
                    "INSERT INTO pg_eventstream_event (channel, data) VALUES ('quick', %s)", [n]
                )
        assert migration.is_alive()
        slow.commit()
    migration.join(60)
    assert not migration.is_alive()
    assert before.value("SELECT count(*) FROM pg_eventstream_event") == 31
    assert before.value("SELECT count(*) FROM pg_constraint WHERE conname = %s", [CONSTRAINT]) == 1
