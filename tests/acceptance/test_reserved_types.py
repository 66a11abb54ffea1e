"""Old events of reserved types reach no client."""

from __future__ import annotations

import sys

import httpx
from httpx_sse import connect_sse

from pg_eventstream.servers.processes import HOST, Process, accepts, free_port
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.environment import DIRECTORY, child_environment
from tests.support.forked import ForkedProcess
from tests.support.publisher import PublisherProcess
from tests.support.reserved_types import send_as_before
from tests.support.sse_client import SSEClient


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
        # Nothing was missing in between, so the proxy did not ask.
        assert [event.type for event in both.control] == ["stream-open"]


def test_old_events_of_such_a_type_do_not_reach_clients_without_a_proxy(
    database: Database, channel: str
) -> None:
    port = free_port()
    server = ForkedProcess(
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
