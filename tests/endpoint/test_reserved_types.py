"""By some types of events the server speaks of the stream itself: nobody else sends these."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any

import httpx
import psycopg
import pytest
from django.core.management import call_command
from django.db import connections
from httpx_sse import connect_sse

from pg_eventstream import InvalidEvent, asend_event, get_events, send_event, send_events, subscribe
from pg_eventstream.servers.processes import HOST, Process, accepts, free_port, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.environment import DIRECTORY, child_environment
from tests.support.origin import Origin, behind_a_proxy
from tests.support.publisher import PublisherProcess
from tests.support.rounds import sequence
from tests.support.sse_client import SSEClient

TYPES = ["stream-open", "stream-reset", "stream-error", "keep-alive", "event-erased"]
#: To an EventSource, types are what they are, to the letter.
OTHERS = ["Stream-Error", "stream-error ", " keep-alive", "stream-closed", "error", "open"]
CONSTRAINT = "pg_eventstream_type_not_reserved"


@pytest.mark.parametrize("event_type", TYPES)
def test_nobody_sends_what_the_server_says(database: Database, event_type: str) -> None:
    refused_by_name = f"'{event_type}' are the library's own.*another"
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


def send_as_before(database: Database, channel: str) -> None:
    """An event of each type, as senders could before the table refused it, between others."""
    with database.connect(autocommit=False) as sender:
        sender.execute(f"ALTER TABLE pg_eventstream_event DROP CONSTRAINT {CONSTRAINT}")
        for event_type in ["message", *TYPES, "message"]:
            sender.execute(
                "INSERT INTO pg_eventstream_event (channel, type, data) VALUES (%s, %s, %s)",
                [channel, event_type, '{"condition": "forbidden"}'],
            )
        sender.execute("SET CONSTRAINTS ALL IMMEDIATE")
        sender.execute(
            f"ALTER TABLE pg_eventstream_event ADD CONSTRAINT {CONSTRAINT} CHECK"
            f" (type NOT IN ({', '.join(map(repr, TYPES))})) NOT VALID"
        )


def assert_left_out(client: SSEClient, channel: str, first: int = 0) -> None:
    assert [event.id.strip() for event in client.wait_count(2)] == [
        f"{channel}:{first + 1}",
        f"{channel}:{first + 7}",
    ]
    assert [event.type for event in client.control] == ["stream-open"]
    assert client.connections == 1


def test_old_events_of_such_a_type_do_not_reach_clients_through_the_proxy(
    database: Database,
    publisher: PublisherProcess,
    app: Process,
    pushpin: Pushpin,
    channel: str,
) -> None:
    url = f"{pushpin.url}/events/"
    with SSEClient(url, [channel]) as live, SSEClient(url, [channel, f"{channel}2"]) as both:
        live.wait_open()
        both.wait_open()
        send_as_before(database, channel)
        assert_left_out(live, channel)
        assert len(both.wait_count(2)) == 2
        with SSEClient(url, [channel], "earliest") as replayed:
            assert_left_out(replayed, channel)
        # Nothing was missing in between, so nobody asked.
        assert [event.type for event in both.control] == ["stream-open"]


def test_old_events_of_such_a_type_do_not_reach_clients_without_a_proxy(
    database: Database, channel: str
) -> None:
    port = free_port()
    server = Process(
        "uvicorn",
        [sys.executable, "-m", "uvicorn", "tests.project.asgi:application", f"--port={port}"],
        log_path=DIRECTORY / f"reserved-{database.name}.log",
        environment=child_environment(),
    )
    server.start(ready=lambda: accepts(port))
    url = f"http://{HOST}:{port}/events/"
    try:
        with SSEClient(url, [channel]) as live:
            live.wait_open()
            send_as_before(database, channel)
            assert_left_out(live, channel)
        with SSEClient(url, [channel], f"{channel}:0") as replayed:
            assert_left_out(replayed, channel)
        got = []
        with (
            httpx.Client(timeout=30) as client,
            connect_sse(client, "GET", f"{url}?channel={channel}&lastEventId=earliest") as source,
        ):
            for event in source.iter_sse():
                got += [event.event]
                if event.id == f"{channel}:7":
                    break
        assert got == ["stream-open", "message", "message"]
    finally:
        server.kill()


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
