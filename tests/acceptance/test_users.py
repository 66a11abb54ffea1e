"""Users whose names look alike, through a proxy."""

from __future__ import annotations

import json

from pg_eventstream import (
    channel_permission_changed,
    send_event,
)
from pg_eventstream.servers.processes import wait_until
from tests.support.alike_users import KEYS, headers, manager, user
from tests.support.database import Database
from tests.support.publisher import PublisherProcess
from tests.support.rounds import sequence
from tests.support.sse_client import OpenStream

__all__ = ["manager"]  # a fixture


def test_proxy_tells_them_apart(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    public = f"public{channel}"
    clients = {key: stream(public, headers=headers(key)).wait_open() for key in KEYS[:4]}
    for key in clients:
        send_event(public, "message", key, skip_user_ids=[user(key)])
    send_event(public, "message", "last")
    for key, client in clients.items():
        assert json.loads(client.wait_count(len(clients))[-1].data) == "last"
        got = [json.loads(event.data) for event in client.events]
        assert got == [*(other for other in clients if other != key), "last"]
        assert client.connections == 1


def test_change_of_permission_asks_the_streams_of_that_user_alone(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    """A stream that asks gets events that were not published."""
    public = f"public{channel}"
    clients = {key: stream(public, headers=headers(key)).wait_open() for key in KEYS[:3]}
    send_event(public, "message", 1)
    for client in clients.values():
        client.wait_count(1)
    wait_until(lambda: database.value(_ACKNOWLEDGED), timeout=20)
    publisher.kill()
    send_event(public, "message", 2)
    sequence(database)
    database.execute(
        "UPDATE pg_eventstream_proxy"
        " SET position = (SELECT max(position) FROM pg_eventstream_stream)"
    )
    publisher.lead()
    channel_permission_changed(user("anonymous"), public)
    clients["anonymous"].wait_count(2)
    channel_permission_changed(user(r"\anonymous"), public)
    clients[r"\anonymous"].wait_count(2)
    assert len(clients[None].events) == 1


_ACKNOWLEDGED = """SELECT (SELECT max(position) FROM pg_eventstream_stream)
                        = (SELECT min(position) FROM pg_eventstream_proxy)"""
