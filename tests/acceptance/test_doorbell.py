"""No event waits: not while the publisher sleeps, is awake, or is about to sleep.

The safety poll is off in all of these tests, so that only the doorbell can wake the publisher.
"""

from __future__ import annotations

import time

from pg_eventstream.servers.processes import wait_until
from tests.support.chance import seeded
from tests.support.database import Database
from tests.support.publisher import NewPublisher, PublisherProcess
from tests.support.sse_client import OpenStream, SSEClient

#: Far longer than a delivery takes, and far shorter than "never".
PROMPTLY = 10.0


def start(new_publisher: NewPublisher) -> PublisherProcess:
    publisher = new_publisher("--verbosity=2", PG_EVENTSTREAM_TEST_SAFETY_POLL="off")
    return publisher.lead()


def wait_for_state(publisher: PublisherProcess, state: str, timeout: float = 20) -> None:
    """Wait until this is the last state that the publisher's doorbell has entered."""
    wait_until(lambda: _states(publisher)[-1:] == [state], timeout=timeout)


def _states(publisher: PublisherProcess) -> list[str]:
    return [line.split()[-1] for line in publisher.log.splitlines() if "doorbell: " in line]


def wait_delivered(client: SSEClient, count: int) -> None:
    """Wait until these events have arrived, which must not pause.

    A burst can be long on a slow machine, and then its delivery takes longer than `PROMPTLY`.
    """
    while (seen := len(client.events)) < count:
        client.wait_count(seen + 1, timeout=PROMPTLY)


def burst(database: Database, channel: str, publisher: PublisherProcess) -> int:
    """Commit events until the publisher stays awake. Returns their number."""
    times = _states(publisher).count("awake")
    deadline = time.monotonic() + 20
    with database.connect() as connection:
        for sent in range(20, 100_000, 20):
            for _ in range(20):
                connection.execute(
                    "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, 'burst')",
                    [channel],
                )
            if _states(publisher).count("awake") > times:
                return sent
            assert time.monotonic() < deadline, _states(publisher)
    raise AssertionError("unreachable")


def test_event_is_delivered_promptly_in_every_state(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    chance = seeded()
    client = stream(channel).wait_open()
    publisher = start(new_publisher)
    sent = 0
    with database.connect() as connection:
        for _ in range(3):
            sent += burst(database, channel, publisher)
            wait_delivered(client, sent)
            # Single events at all moments of the way back to sleep.
            quiet_at = time.monotonic() + 1.8
            while time.monotonic() < quiet_at:
                time.sleep(chance.uniform(0.02, 0.12))
                connection.execute(
                    "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, 'single')",
                    [channel],
                )
                sent += 1
                client.wait_count(sent, timeout=PROMPTLY)
            wait_for_state(publisher, "asleep")
    states = _states(publisher)
    assert min(states.count(state) for state in ("awake", "drowsy", "asleep")) >= 3


def test_event_that_found_the_publisher_awake_is_delivered_when_it_is_not_any_more(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    """The sender did not notify, because the publisher was awake, but commits much later."""
    client = stream(channel).wait_open()
    publisher = start(new_publisher)
    sent = 0
    for _ in range(2):
        wait_for_state(publisher, "asleep")
        with database.connect(autocommit=False) as connection:
            connection.execute("SELECT pg_current_xact_id()")
            sent += burst(database, channel, publisher) + 1
            # Fires the trigger now, instead of a COMMIT that takes long.
            connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            connection.execute(
                "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, 'slow')", [channel]
            )
            wait_for_state(publisher, "drowsy")
            connection.commit()
        wait_delivered(client, sent)
        assert client.events[-1].data == "slow"


def test_sender_that_rang_and_lingers_does_not_stop_the_publisher_from_waking_up(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    """It shares the bell lock until its transaction ends; the publisher only queues for it."""
    client = stream(channel).wait_open()
    publisher = start(new_publisher)
    wait_for_state(publisher, "asleep")
    with database.connect(autocommit=False) as connection:
        connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        connection.execute(
            "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, 'lingers')", [channel]
        )
        sent = 0
        for _ in range(2):
            sent += burst(database, channel, publisher)
            wait_delivered(client, sent)
            # It leaves the queue for the lock, and enters it again with the next burst.
            wait_for_state(publisher, "drowsy")
        connection.commit()
    client.wait_count(sent + 1, timeout=PROMPTLY)
    wait_for_state(publisher, "asleep")
    database.send(channel, "single")
    client.wait_count(sent + 2, timeout=PROMPTLY)
