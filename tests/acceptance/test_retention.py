"""A running publisher prunes."""

from __future__ import annotations

from pg_eventstream import send_event, send_events
from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database
from tests.support.publisher import NewPublisher
from tests.support.sse_client import OpenStream
from tests.support.stored import DAY, age, data


def test_running_publisher_sweeps(
    database: Database,
    new_publisher: NewPublisher,
    stream: OpenStream,
    channel: str,
) -> None:
    client = stream(channel).wait_open()
    first = new_publisher().lead()
    send_events([(channel, "message", n) for n in range(10)])
    client.wait_count(10)
    first.stop()
    age(database, events_of=channel, by=2 * DAY)
    new_publisher().lead()
    wait_until(lambda: data(database) == [], timeout=20)
    send_event(channel, "message", "goes on")
    assert client.wait_count(11)[-1].eids == {channel: 11}
