"""The network that tests break does to connections what it promises.

The tests that use it show whether it cuts, falls silent and heals.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from pg_eventstream.servers.processes import HOST, wait_until
from tests.support.http_service import HttpService, body_of, respond
from tests.support.network import Network, Side

ANSWER = b"x" * 20_000


class Service(HttpService):
    def __init__(self) -> None:
        super().__init__()
        self.requests = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body_of(request)
        self.requests += 1
        respond(request, 200, ANSWER)


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as service:
        yield service


@pytest.fixture
def network(service: Service) -> Iterator[Network]:
    with Network(service.port) as network:
        yield network


def ask(network: Network, body: bytes = b"") -> bytes:
    """The answer. Raises TimeoutError if there is none after 20 seconds."""
    connection = http.client.HTTPConnection(HOST, network.port, timeout=20)
    try:
        connection.request("POST", "/", body)
        return connection.getresponse().read()
    finally:
        connection.close()


def seconds_to_ask(network: Network, body: bytes = b"") -> float:
    start = time.monotonic()
    assert ask(network, body) == ANSWER
    return time.monotonic() - start


def test_delay_counts_each_way(network: Network) -> None:
    network.delay(0.2)
    assert seconds_to_ask(network) >= 0.4
    network.delay(60)
    network.heal()
    assert ask(network) == ANSWER


def test_throttle_counts_each_way(network: Network) -> None:
    network.throttle(100_000)
    assert seconds_to_ask(network) >= len(ANSWER) / 100_000
    assert seconds_to_ask(network, body=b"x" * 20_000) >= 2 * len(ANSWER) / 100_000
    network.throttle(len(ANSWER) // 60)
    network.heal()
    assert ask(network) == ANSWER


def test_deaf_one_way_is_deaf_that_way_only(network: Network, service: Service) -> None:
    ways: list[tuple[Side, int]] = [("server", 0), ("client", 1)]
    for way, heard in ways:
        service.requests = 0
        network.deaf(way)
        connection = http.client.HTTPConnection(HOST, network.port, timeout=0.3)
        connection.request("POST", "/", b"x")
        with pytest.raises(TimeoutError):
            connection.getresponse()
        assert service.requests == heard
        network.heal()
        wait_until(lambda: service.requests == 1, timeout=5)
        connection.close()
    assert ask(network) == ANSWER


def test_answer_is_cut_where_it_should_be(network: Network) -> None:
    network.cut_after(15_000)
    with pytest.raises(ConnectionResetError):
        ask(network)
    network.cut_after(15_000, reset=False)
    with pytest.raises(http.client.IncompleteRead) as raised:
        ask(network)
    assert 14_000 < len(raised.value.partial) < 15_000  # the headers count as well
    network.cut_after(5, reset=False)
    with pytest.raises(http.client.BadStatusLine):
        ask(network)
    network.heal()
    assert ask(network) == ANSWER
