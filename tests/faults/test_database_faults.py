"""PostgreSQL crashes, and ends sessions at random; clients only notice a pause."""

from __future__ import annotations

import pytest

from pg_eventstream.servers.processes import wait_until
from tests.support.chance import seeded
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.environment import THOROUGH
from tests.support.faults import OURS, terminating_backends
from tests.support.load import Load
from tests.support.publisher import NewPublisher
from tests.support.sse_client import OpenStream

pytestmark = pytest.mark.faults


CRASHES = 20 if THOROUGH else 2
TERMINATIONS = 400 if THOROUGH else 15


@pytest.mark.timeout(600)
def test_postgresql_that_crashes_under_load_loses_and_repeats_nothing(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    chance = seeded()
    client = stream(channel).wait_open()
    publishers = [new_publisher().lead(), new_publisher()]
    publishers[1].start()
    load = Load(database, channel, persistent=True, seed=chance.randrange(1000))
    with load.running():
        for _ in range(CRASHES):
            client.wait_count(len(client.events) + chance.randrange(1, 100))
            if chance.random() < 0.5:
                database.postgres.stop("immediate")
            else:
                database.postgres.kill()
            database.postgres.start()
        client.wait_count(len(client.events) + 1)
    load.settle()
    load.check(client)
    assert all(publisher.running for publisher in publishers)


def test_sequenced_events_survive_a_crash_with_any_settings_of_the_database(
    database: Database,
) -> None:
    """Clients can have seen it by then. The events themselves precede it in the WAL."""
    for count in range(1, 4):
        with database.connect() as connection:
            connection.execute("SET synchronous_commit = off")
            connection.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', '')")
            connection.execute("SELECT pg_eventstream_sequence()")
            database.postgres.kill()
            database.postgres.start()
        assert database.fetch(
            "SELECT s.eid FROM pg_eventstream_stream s JOIN pg_eventstream_event e"
            " ON e.id = s.event_id ORDER BY s.eid"
        ) == [(eid,) for eid in range(1, count + 1)]


@pytest.mark.timeout(600)
def test_sessions_ended_at_random_all_the_time_lose_and_repeat_nothing(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    chance = seeded()
    client = stream(channel).wait_open()
    publishers = [new_publisher().lead(), new_publisher()]
    publishers[1].start()
    load = Load(database, channel, persistent=True, seed=chance.randrange(1000))
    with load.running(), terminating_backends(database, chance) as ended:
        wait_until(lambda: len(ended) >= TERMINATIONS, timeout=300)
    load.settle()
    load.check(client)
    assert all(publisher.running for publisher in publishers)
    if THOROUGH:  # each kind of session was ended
        assert {name.split(" ")[1] for name in ended if " " in name} >= {
            "leader", "bell", "feed", "prune",
        }  # fmt: skip


@pytest.mark.thorough
def test_publisher_that_leads_again_shares_no_connection_with_its_last_lead(
    database: Database, new_publisher: NewPublisher, control: ControlPort
) -> None:
    """The response to one batch must not be taken for the response to another."""
    control.silent.set()
    publisher = new_publisher(PG_EVENTSTREAM_TEST_GRIP_URL=control.url).lead()
    database.send("a")
    wait_until(lambda: len(control.bodies) == 1, timeout=20)
    wait_until(lambda: database.value(f"SELECT count(*) {OURS}") == 4, timeout=20)
    database.execute(f"SELECT pg_terminate_backend(pid) {OURS}")
    # The first one has no response yet.
    wait_until(lambda: len(control.bodies) == 2, timeout=20)
    control.silent.clear()
    control.answering.set()
    wait_until(lambda: len(control.ids) >= 2, timeout=20)
    assert publisher.log.count(": leading") == 2
    assert "cannot be reached" not in publisher.log
    # Nor does the first publisher continue: its feed would read as soon as it has its response.
    feeds = f"SELECT count(*) {OURS} AND starts_with(application_name, 'pg_eventstream feed')"
    with pytest.raises(TimeoutError):
        wait_until(lambda: database.value(feeds) != 1, timeout=5)
