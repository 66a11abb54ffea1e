"""The publisher is killed at each point of its work; clients only notice a pause."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pg_eventstream.servers.pushpin import Pushpin
from tests.support import faults
from tests.support.chance import seeded
from tests.support.database import Database
from tests.support.environment import THOROUGH
from tests.support.load import Load
from tests.support.publisher import NewPublisher
from tests.support.sse_client import OpenStream

pytestmark = pytest.mark.faults

REPEATS = 8 if THOROUGH else 1
POINTS = len(faults.POINTS) if THOROUGH else 2


@pytest.fixture
def relay(pushpin: Pushpin) -> Iterator[faults.Relay]:
    with faults.Relay(pushpin.control_port) as server:
        yield server


@pytest.mark.timeout(900)
def test_publisher_killed_at_any_point_of_its_work_loses_and_repeats_nothing(
    database: Database,
    new_publisher: NewPublisher,
    stream: OpenStream,
    relay: faults.Relay,
    channel: str,
) -> None:
    chance = seeded()
    steady = stream(channel).wait_open()
    load = Load(database, channel, pause=0.01, seed=chance.randrange(1000))
    stage = faults.Stage(database, load, relay, new_publisher, chance)
    with load.running():
        for _ in range(REPEATS):
            for point in chance.sample(faults.POINTS, POINTS):
                print(point.__name__)  # noqa: T201  (shown if the test fails)
                with point(stage) as publisher:
                    publisher.kill()
    stage.lead()
    load.check(steady)
    assert steady.connections == 1
    # Each batch was pruned completely or not at all.
    assert not database.fetch(
        "SELECT FROM pg_eventstream_stream AS s"
        "  FULL JOIN pg_eventstream_event AS e ON e.id = s.event_id"
        " WHERE s.event_id IS NULL OR e.id IS NULL"
    )
