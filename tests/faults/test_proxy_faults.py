"""The proxy dies, hangs and refuses under load; clients get all events once, in order.

Pushpin and the publisher are real. For faults that Pushpin cannot be made to have, a control port
that has them stands in front of its own.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection

import pytest

from pg_eventstream.servers.processes import HOST, children, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.chance import seeded
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.environment import THOROUGH, publishes_to
from tests.support.load import Load, two_clients
from tests.support.publisher import BACK, UNREACHABLE, NewPublisher

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("app")]


KILLS = 30 if THOROUGH else 2
PAUSES = 20 if THOROUGH else 2
#: A starting proxy silently loses requests, which clients have to give up.
PATIENCE = 3.0
#: The seconds that the publisher waits for a response.
ANSWER_SECONDS = 10.0


@pytest.fixture
def proxy(second_pushpin: Pushpin) -> Pushpin:
    """A separate proxy that the test can break."""
    second_pushpin.start()
    return second_pushpin


# Pushpin itself


def test_proxy_killed_at_any_moment_costs_clients_only_a_pause(
    database: Database, new_publisher: NewPublisher, proxy: Pushpin, channel: str
) -> None:
    chance = seeded()
    publisher = new_publisher(**publishes_to(proxy.control_url)).lead()
    load = Load(database, channel, seed=chance.randrange(1000))
    with two_clients(proxy.url, channel, patience=PATIENCE) as (steady, restless):
        with load.running():
            for n in range(KILLS):
                time.sleep(chance.uniform(0, 0.4))  # the random moment
                if n % 2:
                    _kill_one_service(proxy, chance)
                proxy.kill()
                wait_until(lambda k=n: publisher.lines_with(UNREACHABLE) > k, timeout=20)  # type: ignore[misc]
                proxy.start()
                restless.drop()
                load.wait_delivered(steady, restless)
        load.check(steady)
        load.check(restless)
    # Clients can get everything, also from the endpoint, before the publisher has its response.
    wait_until(lambda: publisher.lines_with(BACK) >= KILLS, timeout=60)
    assert "events wait, trying again" in publisher.log


def _kill_one_service(proxy: Pushpin, chance: random.Random) -> None:
    """Kill one of the services that Pushpin consists of; the others then end."""
    with suppress(ProcessLookupError):
        os.kill(chance.choice(children(proxy.pid)), signal.SIGKILL)
    proxy.process.wait(timeout=20)


@pytest.mark.thorough
def test_proxy_that_was_away_gets_what_has_been_waiting(
    database: Database, new_publisher: NewPublisher, proxy: Pushpin, channel: str
) -> None:
    load = Load(database, channel)
    publisher = new_publisher(**publishes_to(proxy.control_url)).lead()
    with two_clients(proxy.url, channel, patience=PATIENCE) as clients:
        with load.running():
            for waiting in (1500, 10_000):
                load.wait_delivered(*clients)
                proxy.stop()
                count = len(load.committed) + waiting
                wait_until(lambda n=count: len(load.committed) >= n, timeout=60)  # type: ignore[misc]
                proxy.start()
                load.wait_delivered(*clients)
        for client in clients:
            load.check(client)
    publisher.wait_for_log(BACK, timeout=60)
    # At the first failure and the tenth, not at each one.
    assert publisher.lines_with("trying again") <= 8


def test_proxy_that_hangs_and_continues_repeats_nothing(
    database: Database, new_publisher: NewPublisher, proxy: Pushpin, channel: str
) -> None:
    chance = seeded()
    new_publisher(**publishes_to(proxy.control_url)).lead()
    load = Load(database, channel, seed=chance.randrange(1000))
    with two_clients(proxy.url, channel) as (steady, restless):
        with load.running():
            for _ in range(PAUSES):
                services = children(proxy.pid)
                for pid in chance.sample(services, chance.randrange(1, len(services) + 1)):
                    os.kill(pid, signal.SIGSTOP)
                restless.drop()
                time.sleep(chance.uniform(0.1, 0.8))
                for pid in services:
                    os.kill(pid, signal.SIGCONT)
                load.wait_delivered(steady, restless)
        load.check(steady)
        load.check(restless)
    assert steady.connections == 1


@pytest.mark.thorough
def test_batch_that_a_hanging_proxy_gets_again_and_again_is_delivered_once(
    database: Database, new_publisher: NewPublisher, proxy: Pushpin, channel: str
) -> None:
    """The requests of a publisher that gave up waiting are still there when it continues."""
    publisher = new_publisher(**publishes_to(proxy.control_url)).lead()
    load = Load(database, channel, pause=0.02)
    with two_clients(proxy.url, channel) as clients:
        with load.running():
            load.wait_delivered(*clients)
            for pid in children(proxy.pid):
                os.kill(pid, signal.SIGSTOP)
            publisher.wait_for_log("cannot be reached: timed out", timeout=3 * ANSWER_SECONDS)
            time.sleep(2.5 * ANSWER_SECONDS)  # so that it is repeated some more times
            for pid in children(proxy.pid):
                os.kill(pid, signal.SIGCONT)
            load.wait_delivered(*clients)
        for client in clients:
            load.check(client)
    publisher.wait_for_log(BACK, timeout=60)


# A control port with responses that Pushpin would only send if it were faulty


class FrontPort(ControlPort):
    """Forwards to a proxy's own control port what it accepts."""

    def __init__(self, proxy: Pushpin) -> None:
        super().__init__()
        self._proxy = proxy

    def take(self, body: bytes) -> None:
        super().take(body)
        connection = HTTPConnection(HOST, self._proxy.control_port, timeout=20)
        connection.request("POST", "/publish/", body)
        assert connection.getresponse().status == 200
        connection.close()


@pytest.fixture
def front(pushpin: Pushpin) -> Iterator[FrontPort]:
    with FrontPort(pushpin) as port:
        yield port


def test_proxy_that_is_unavailable_for_a_while_gets_everything_in_order(
    database: Database,
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    front: FrontPort,
    channel: str,
) -> None:
    publisher = new_publisher(**publishes_to(front.url)).lead()
    load = Load(database, channel, pause=0.01)
    rounds = [(n, lies) for n in ((1, 5, 9) if THOROUGH else (1, 3)) for lies in (False, True)]
    with two_clients(pushpin.url, channel) as clients:
        with load.running():
            for n, (failures, lies) in enumerate(rounds):
                load.wait_delivered(*clients)
                front.takes_all = lies
                front.answers = [503, 500, 502, 504, 401, 429, 302, 404, 500][:failures]
                wait_until(lambda k=n: publisher.lines_with(BACK) > k, timeout=60)  # type: ignore[misc]
                clients[1].drop()
        for client in clients:
            load.check(client)
            assert client.connections == (1 if client is clients[0] else len(rounds) + 1)
    assert "answered 503: no; " in publisher.log
    assert "events wait, trying again" in publisher.log


def test_event_that_the_proxy_refuses_reaches_clients_by_the_endpoint_and_delays_no_other(
    database: Database,
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    front: FrontPort,
    channel: str,
) -> None:
    front.refused = "poison"
    publisher = new_publisher(**publishes_to(front.url)).lead()
    load = Load(database, channel, senders=2, pause=0.1)  # not a burst, which has its own hints
    poisoned = 30 if THOROUGH else 3
    with two_clients(pushpin.url, channel) as clients:
        with load.running():
            for n in range(poisoned):
                load.wait_delivered(*clients)
                database.send(channel, f"poison {n}")
                load.committed.append(f"poison {n}")
        for client in clients:
            client.wait_count(len(load.committed))
        # No event follows this one that would reveal the gap.
        database.send(channel, "poison at last")
        load.committed.append("poison at last")
        for client in clients:
            load.check(client)
            assert client.connections == 1
    assert publisher.log.count("published a hint instead") == poisoned + 1
    assert re.search(rf"refused event \d+ of channel '{channel}' \(", publisher.log)
