"""A client has the next link of another client's stream."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing

import pytest

from pg_eventstream import send_events
from pg_eventstream.grip import links
from pg_eventstream.servers.processes import Process
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.origin import Origin, behind_a_proxy, signature
from tests.support.rounds import sequence


@pytest.fixture(autouse=True)
def proxied(database: Database) -> Iterator[None]:
    with behind_a_proxy:
        yield


def test_client_cannot_continue_with_the_link_of_another_clients_stream(
    database: Database, app: Process, pushpin: Pushpin, channel: str
) -> None:
    """The link is refused without Grip-Last, which only the proxy may set."""
    send_events([(channel, "message", "secret", None, False)])
    sequence(database)
    link = f"/events/{links.NEXT}{links.sign(links.Session((channel,), 'anonymous'))}"
    last = {"Grip-Last": f"events-{channel}; last-id=0"}
    assert "secret" in Origin().ask(link, last).body  # as the proxy sends it
    for headers in ({}, last, {"grip-last": last["Grip-Last"], "Grip-Sig": signature()}):
        connection = http.client.HTTPConnection(pushpin.url.removeprefix("http://"), timeout=10)
        with closing(connection):
            connection.request("GET", link, headers=headers)
            response = connection.getresponse()
            assert (response.status, response.read()) == (403, b"Grip-Last lacks a channel.\n")
