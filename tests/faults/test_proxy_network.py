"""The network to a proxy and its clients is slow, silent or breaks; no event is lost or doubled."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from django.test import override_settings

from pg_eventstream.limits import Limits
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.servers.processes import wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.chance import seeded
from tests.support.database import Database
from tests.support.environment import THOROUGH, publishes_to
from tests.support.load import Load, two_clients
from tests.support.network import Network
from tests.support.publisher import BACK, UNREACHABLE, NewPublisher, PublisherProcess
from tests.support.sse_client import OpenStream, SSEClient

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("app")]


BREAKS = 60 if THOROUGH else 4
SECONDS = 20.0 if THOROUGH else 1.0
#: Far longer than a delivery takes, and far shorter than the broken proxy needs.
PROMPTLY = 2.0
#: The size of Pushpin's response to a batch, in bytes.
ANSWER_BYTES = 130


@pytest.fixture
def network(pushpin: Pushpin) -> Iterator[Network]:
    """The network between the publisher and the proxy."""
    with Network(pushpin.control_port) as network:
        yield network


# Between the publisher and the proxy


@pytest.mark.thorough
def test_slow_proxy_gets_everything_though_late(
    database: Database,
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    network: Network,
    channel: str,
) -> None:
    publisher = new_publisher(**publishes_to(network.url)).lead()
    load = Load(database, channel)
    with two_clients(pushpin.url, channel) as clients:
        network.throttle(30_000)
        network.delay(0.05)
        with load.running():
            time.sleep(SECONDS)
        assert len(clients[0].events) < len(load.committed)  # the network is too slow for this load
        clients[1].drop()
        network.heal()
        for client in clients:
            load.check(client)
    assert publisher.lines_with("WARNING") == 0  # there is nothing to do about it


def test_batch_whose_answer_is_lost_on_the_way_is_not_delivered_twice(
    database: Database,
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    network: Network,
    channel: str,
) -> None:
    """The publisher cannot know that the batch was taken, so it repeats it."""
    chance = seeded()
    publisher = new_publisher(**publishes_to(network.url)).lead()
    load = Load(database, channel, seed=chance.randrange(1000))
    with two_clients(pushpin.url, channel) as (steady, restless):
        with load.running():
            for n in range(BREAKS):
                load.wait_delivered(steady, restless)
                # The first one in a way that is certainly noticed.
                count = chance.randrange(1, ANSWER_BYTES) if n else 1
                network.cut_after(count, reset=n == 0 or chance.random() < 0.7)
                made = network.connections
                wait_until(lambda k=made: network.connections > k + 1, timeout=20)  # type: ignore[misc]
                network.heal()
                if n % 3 == 0:
                    restless.drop()
        load.check(steady)
        load.check(restless)
    assert steady.connections == 1
    assert publisher.lines_with(UNREACHABLE) >= BREAKS // 4
    wait_until(lambda: publisher.lines_with(BACK) >= BREAKS // 4, timeout=60)


@pytest.mark.thorough
def test_response_that_ends_after_its_status_line_counts(
    database: Database,
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    network: Network,
    channel: str,
) -> None:
    publisher = new_publisher(**publishes_to(network.url)).lead()
    load = Load(database, channel)
    network.cut_after(len("HTTP/1.0 200 OK\r\n"), reset=False)
    with two_clients(pushpin.url, channel) as clients:
        with load.running():
            load.wait_delivered(*clients)
        for client in clients:
            load.check(client)
    assert publisher.lines_with("WARNING") == 0


def test_control_port_that_falls_silent_gets_everything_once(
    database: Database,
    pushpin: Pushpin,
    network: Network,
    channel: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The publisher cannot know whether the proxy has received the request."""
    caplog.set_level(logging.INFO)
    load = Load(database, channel)
    with (
        two_clients(pushpin.url, channel) as clients,
        override_settings(**_proxy(network)),
        running(Publisher(Connector("default", limits=Limits(proxy_answer=0.3)))),
    ):
        with load.running():
            for n, way in enumerate((None, "server", "client") * (10 if THOROUGH else 1)):
                load.wait_delivered(*clients)
                made = network.connections
                network.deaf(way)  # type: ignore[arg-type]
                wait_until(lambda k=made: network.connections >= k + 3, timeout=20)  # type: ignore[misc]
                network.heal()
                wait_until(lambda k=n: caplog.text.count(BACK) > k, timeout=20)  # type: ignore[misc]
                clients[1].drop()
        for client in clients:
            load.check(client)
    assert "cannot be reached: timed out; " in caplog.text


@pytest.mark.thorough
def test_batch_that_is_repeated_for_longer_than_the_proxy_remembers_is_delivered_once(
    database: Database,
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    network: Network,
    channel: str,
) -> None:
    """It remembers ids for a minute; after that prev-id tells which items are old."""
    publisher = new_publisher(**publishes_to(network.url)).lead()
    load = Load(database, channel, pause=0.1)
    with two_clients(pushpin.url, channel) as clients:
        with load.running():
            load.wait_delivered(*clients)
            network.deaf("client")
            publisher.wait_for_log(UNREACHABLE, timeout=30)
            time.sleep(75)
            network.heal()
            publisher.wait_for_log(BACK, timeout=30)
            load.wait_delivered(*clients)
        for client in clients:
            load.check(client)


def _proxy(network: Network) -> dict[str, object]:
    url = publishes_to(network.url)["PG_EVENTSTREAM_TEST_GRIP_URL"]
    return {"GRIP_URL": url}


@contextmanager
def running(publisher: Publisher) -> Iterator[None]:
    thread = threading.Thread(target=publisher.run)
    thread.start()
    try:
        yield
    finally:
        publisher.stop()
        thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "fault",
    ["deaf", *(pytest.param(f, marks=pytest.mark.thorough) for f in ("slow", "no answers", "cut"))],
)
def test_broken_proxy_delays_no_other_and_ends_up_complete(
    database: Database,
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    second_pushpin: Pushpin,
    channel: str,
    fault: str,
) -> None:
    second_pushpin.start()
    load = Load(database, channel)
    with (
        Network(second_pushpin.control_port) as network,
        two_clients(pushpin.url, channel) as well,
        two_clients(second_pushpin.url, channel) as late,
    ):
        publisher = new_publisher(**publishes_to(network.url, pushpin.control_url)).lead()
        with load.running():
            load.wait_delivered(*well, *late)
            _break(network, fault)
            broken_at = time.monotonic()
            while time.monotonic() < broken_at + SECONDS:
                count = len(load.committed) + 1
                for client in well:
                    client.wait_count(count, timeout=PROMPTLY)
            wait_until(
                lambda: len(late[0].events) < len(well[0].events) - 1, timeout=PROMPTLY, check=0.01
            )
            network.heal()
            late[1].drop()
        for client in (*well, *late):
            load.check(client)
    assert well[0].connections == late[0].connections == 1
    assert pushpin.control_url not in publisher.log.partition("leading")[2]  # this proxy is healthy


def _break(network: Network, fault: str) -> None:
    if fault == "slow":
        network.throttle(10_000)
    elif fault == "cut":
        network.cut()
    else:
        network.deaf(None if fault == "deaf" else "client")


# Between the proxy and its clients


def test_client_whose_network_breaks_misses_nothing(
    database: Database, publisher: PublisherProcess, pushpin: Pushpin, channel: str
) -> None:
    chance = seeded()
    load = Load(database, channel, pause=0.01, seed=chance.randrange(1000))
    with Network(pushpin.port) as network, two_clients(network.url, channel) as clients:
        with load.running():
            for _ in range(BREAKS):
                _disturb(network, chance)
                time.sleep(chance.uniform(0, 0.3))
                network.heal()
                load.wait_delivered(*clients)
        for client in clients:
            load.check(client)


def _disturb(network: Network, chance: random.Random) -> None:
    faults: list[Callable[[], None]] = [
        network.cut,
        network.deaf,
        lambda: network.deaf("client"),
        lambda: network.delay(chance.uniform(0, 0.2)),
        lambda: network.throttle(20_000),
        lambda: network.cut_after(chance.randrange(20_000)),
    ]
    chance.choice(faults)()


@pytest.mark.thorough
def test_client_that_reads_slowly_gets_what_the_proxy_drops(
    database: Database, publisher: PublisherProcess, pushpin: Pushpin, channel: str
) -> None:
    """It queues 100 events for a client and drops the rest, which the stream then fetches."""
    load = Load(database, channel, length=10_000)
    with Network(pushpin.port) as network:
        network.throttle(50_000)
        with SSEClient(f"{network.url}/events/", [channel]) as client:
            client.wait_open()
            with load.running():
                wait_until(lambda: len(load.committed) > 1000, timeout=60)
            network.heal()
            load.check(client)
            assert client.connections == 1


@pytest.mark.thorough
def test_client_that_does_not_read_for_a_while_gets_what_the_proxy_drops(
    database: Database,
    publisher: PublisherProcess,
    pushpin: Pushpin,
    stream: OpenStream,
    channel: str,
) -> None:
    """Pushpin 1.36 takes up to 45 seconds to notice that it reads again."""
    with Network(pushpin.port) as network:
        network.throttle(50_000)  # a slow client with small buffers
        with SSEClient(f"{network.url}/events/", [channel]) as client:
            client.wait_open()
            network.deaf("client")
            database.execute(
                "INSERT INTO pg_eventstream_event (channel, data)"
                " SELECT %s, n || repeat('x', 10000) FROM generate_series(1, 1500) AS n",
                [channel],
            )
            reader = stream(channel, last_event_id=f"{channel}:0")
            reader.wait_count(1500, timeout=60)
            network.heal()
            client.wait_count(1500, timeout=100)
    assert [event.eids[channel] for event in client.events] == list(range(1, 1501))
    assert client.connections == 1
