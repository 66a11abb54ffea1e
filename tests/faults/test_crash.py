"""The publisher is killed, stopped and replaced; clients only notice a pause."""

from __future__ import annotations

import itertools
import os
import signal
import time

import pytest

from pg_eventstream.servers.processes import wait_until
from tests.support.chance import seeded
from tests.support.database import Database
from tests.support.environment import THOROUGH
from tests.support.faults import OURS, suspended
from tests.support.load import Load
from tests.support.publisher import NewPublisher, PublisherProcess
from tests.support.sse_client import OpenStream, SSEClient

pytestmark = pytest.mark.faults

KILLS = 50 if THOROUGH else 3
ROUNDS = 40 if THOROUGH else 3
FEW = 10 if THOROUGH else 2
TAKEOVER_SECONDS = 2.0


def test_publisher_killed_at_any_moment_loses_and_repeats_nothing(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    chance = seeded()
    steady = stream(channel).wait_open()
    restless = stream(channel, reconnect=True).wait_open()
    load = Load(database, channel, seed=chance.randrange(1000))
    with load.running():
        for _ in range(KILLS):
            publisher = new_publisher().lead()
            time.sleep(chance.uniform(0, 0.4))  # the random moment
            publisher.kill()
            restless.drop()
    new_publisher().lead()
    load.check(steady)
    load.check(restless)
    assert steady.connections == 1
    assert restless.connections > KILLS / 2


@pytest.mark.timeout(600)
def test_standby_takes_over_when_the_leader_is_killed(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    chance = seeded()
    steady = stream(channel).wait_open()
    restless = stream(channel, reconnect=True).wait_open()
    load = Load(database, channel, seed=chance.randrange(1000))
    leader = new_publisher().lead()
    gaps = []
    with load.running():
        for _ in range(KILLS):
            standby = new_publisher()
            standby.start()
            standby.wait_for_log("standing by")
            time.sleep(chance.uniform(0, 0.2))  # the random moment
            killed_at = time.time()
            leader.kill()
            restless.drop()
            standby.wait_for_log(": leading")
            steady.wait_for(lambda at=killed_at: steady.events[-1].at > at + 0.05)  # type: ignore[misc]
            gaps.append(_longest_gap_since(steady, killed_at))
            leader = standby
    load.check(steady)
    load.check(restless)
    assert max(gaps) < TAKEOVER_SECONDS, gaps


def _longest_gap_since(client: SSEClient, since: float) -> float:
    """The longest time without an event at a client under steady load, around a moment."""
    times = [since, *(event.at for event in client.events if event.at > since), time.time()]
    return max(after - before for before, after in itertools.pairwise(times))


def test_leader_that_is_suspended_and_continued_repeats_nothing(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    load = Load(database, channel)
    leader = new_publisher().lead()
    standby = new_publisher()
    standby.start()
    standby.wait_for_log("standing by")
    with load.running():
        for _ in range(3):
            client.wait_count(len(client.events) + 20)
            os.kill(leader.pid, signal.SIGSTOP)
            count = len(load.committed)
            wait_until(lambda least=count + 100: len(load.committed) > least, timeout=20)  # type: ignore[misc]
            os.kill(leader.pid, signal.SIGCONT)
    load.check(client)


@pytest.mark.parametrize(
    "seconds",
    # The proxy remembers for a minute what it has published.
    [1, *(pytest.param(n, marks=pytest.mark.thorough) for n in (30, 70))],
)
def test_leader_that_was_suspended_while_another_took_over_repeats_nothing(
    database: Database,
    new_publisher: NewPublisher,
    stream: OpenStream,
    channel: str,
    seconds: float,
) -> None:
    """It continues in the middle of its work, and no longer leads."""
    client = stream(channel).wait_open()
    load = Load(database, channel, pause=0.02)
    leader = new_publisher().lead()
    with load.running():
        for _ in range(3 if THOROUGH and seconds == 1 else 1):
            client.wait_count(len(client.events) + 20)
            wait_until(lambda: database.value(f"SELECT count(*) {OURS}") == 4, timeout=20)
            with suspended(leader):
                database.execute(f"SELECT pg_terminate_backend(pid) {OURS}")
                other = new_publisher().lead()
                client.wait_count(len(client.events) + 20)
                time.sleep(seconds)
            leader.wait_for_log("standing by")
            client.wait_count(len(client.events) + 20)
            leader.kill()
            leader = other
    load.check(client)


@pytest.mark.timeout(900)
def test_three_publishers_killed_and_suspended_at_random_repeat_nothing(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    chance = seeded()
    client = stream(channel).wait_open()
    load = Load(database, channel, seed=chance.randrange(1000))
    publishers = [new_publisher() for _ in range(3)]
    for publisher in publishers:
        publisher.start()
        publisher.wait_for_log("proxies: ")
    with load.running():
        for _ in range(ROUNDS):
            client.wait_count(len(client.events) + 20)
            sleeper, victim, _bystander = chance.sample(publishers, 3)
            with suspended(sleeper):
                time.sleep(chance.uniform(0, 0.3))  # the random moment
                victim.kill()
                publishers.remove(victim)
                publishers.append(new_publisher())
                publishers[-1].start()
                time.sleep(chance.uniform(0, 2.0 if THOROUGH else 0.5))
    load.check(client)


def test_sigterm_ends_the_publisher_in_good_order(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    load = Load(database, channel)
    with load.running():
        for _ in range(FEW):
            publisher = new_publisher().lead()
            client.wait_count(len(client.events) + 20)
            os.kill(publisher.pid, signal.SIGTERM)
            wait_until(lambda p=publisher: not p.running, timeout=5)  # type: ignore[misc]
            assert publisher.returncode == 0
            assert "stopped" in publisher.log
    new_publisher().lead()
    load.check(client)


def test_sigterm_ends_a_publisher_that_waits_for_a_lock(
    database: Database, publisher: PublisherProcess, channel: str
) -> None:
    with database.connect(autocommit=False) as connection:
        connection.execute("LOCK TABLE pg_eventstream_cursor IN SHARE MODE")
        database.send(channel)
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'"
        wait_until(lambda: database.value(waiting) > 0, timeout=20)
        os.kill(publisher.pid, signal.SIGTERM)
        wait_until(lambda: not publisher.running, timeout=5)
        assert publisher.returncode == 0


def test_postgres_backends_terminated_under_load(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    load = Load(database, channel)
    with load.running():
        for _ in range(FEW):
            client.wait_count(len(client.events) + 50)
            # Those of the leader, the bell, the feed and the pruner.
            wait_until(lambda: database.value(f"SELECT count(*) {OURS}") >= 4, timeout=20)
            database.execute(f"SELECT pg_terminate_backend(pid) {OURS}")
    load.check(client)
    assert publisher.running
