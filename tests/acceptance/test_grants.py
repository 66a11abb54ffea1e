"""Servers and publishers whose roles have only the grants of ``migrations/grants.sql``."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from pg_eventstream.servers.processes import Process, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.application import application
from tests.support.database import Database
from tests.support.publisher import NewPublisher
from tests.support.roles import as_role, granted, make_old
from tests.support.sse_client import OpenStream, SSEClient


def test_events_arrive_when_every_role_has_its_grants_only(
    database: Database,
    new_publisher: NewPublisher,
    stream: OpenStream,
    channel: str,
) -> None:
    publisher = new_publisher(
        PG_EVENTSTREAM_TEST_DSN=as_role(database, granted(database, "publisher"))
    ).lead()
    client = stream(channel).wait_open()
    with psycopg.connect(as_role(database, granted(database, "sender"))) as sender:
        for n in range(3):
            sender.execute(
                "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s)",
                [channel, str(n)],
            )
            sender.commit()
    events = client.wait_count(3)
    assert [event.data for event in events] == ["0", "1", "2"]
    late = stream(channel, last_event_id=events[0].id)  # reads what it missed
    assert [event.data for event in late.wait_count(2)] == ["1", "2"]
    assert "permission denied" not in publisher.log


def test_server_alone_streams_with_its_grants_only(
    database: Database, app_port: int, channel: str
) -> None:
    role = granted(database, "endpoint", "sequencer")
    server = application(app_port, PG_EVENTSTREAM_TEST_DSN=as_role(database, role))
    try:
        with SSEClient(f"http://127.0.0.1:{app_port}/events/", [channel]) as client:
            client.wait_open()
            database.send(channel, "1")
            assert [event.data for event in client.wait_count(1)] == ["1"]
    finally:
        server.kill()


def test_publisher_prunes_with_its_grants_only(
    database: Database, new_publisher: NewPublisher, channel: str
) -> None:
    role = granted(database, "publisher")
    for _ in range(3):
        database.send(channel)
    new_publisher("--once").start()
    wait_until(
        lambda: database.value("SELECT count(*) FROM pg_eventstream_stream") == 3, timeout=20
    )
    make_old(database)
    publisher = new_publisher(PG_EVENTSTREAM_TEST_DSN=as_role(database, role)).lead()
    wait_until(lambda: database.value("SELECT count(*) FROM pg_eventstream_event") == 0, timeout=20)
    assert "permission denied" not in publisher.log


@pytest.fixture
def app(database: Database, pushpin: Pushpin, app_port: int) -> Iterator[Process]:
    """The application server, connected with a role that is only an endpoint."""
    dsn = as_role(database, granted(database, "endpoint"))
    process = application(app_port, pushpin, PG_EVENTSTREAM_TEST_DSN=dsn)
    yield process
    process.stop(timeout=5)
