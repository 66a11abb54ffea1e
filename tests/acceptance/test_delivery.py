"""From INSERT to a client: what is delivered, and what never is."""

from __future__ import annotations

import subprocess
import sys

import pytest
from django.db import transaction

from pg_eventstream import send_event, send_events
from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database
from tests.support.publisher import NewPublisher, PublisherProcess
from tests.support.sse_client import OpenStream


@pytest.mark.parametrize("app", ["asgi", "wsgi"], indirect=True)
def test_committed_event_reaches_a_client(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    with transaction.atomic():
        send_event(channel, "greeting", {"text": "hello, 100 %"})
    database.send(channel, "plain text from SQL")
    first, second = client.wait_count(2)
    assert (first.type, first.data, first.eids) == (
        "greeting",
        '{"text": "hello, 100 %"}',
        {channel: 1},
    )
    assert (second.type, second.data, second.eids) == (
        "message",
        "plain text from SQL",
        {channel: 2},
    )


def test_rolled_back_event_is_never_published(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    for n in range(20):
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            send_event(channel, "message", "rolled back")
            _ = 1 / 0
        with transaction.atomic():
            send_event(channel, "message", n)
    assert [event.data for event in client.wait_count(20)] == [str(n) for n in range(20)]
    assert [event.eids[channel] for event in client.events] == list(range(1, 21))
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 20


def test_event_of_a_rolled_back_savepoint_is_never_published(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    with transaction.atomic():
        send_event(channel, "message", "before")
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            send_event(channel, "message", "inside")
            _ = 1 / 0
        with transaction.atomic():
            send_event(channel, "message", "released")
        send_event(channel, "message", "after")
    assert [event.data for event in client.wait_count(3)] == ['"before"', '"released"', '"after"']
    assert client.events[-1].eids == {channel: 3}


def test_sender_killed_before_commit_publishes_nothing(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED_SENDER, channel], stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout
    assert killed.stdout.readline() == "sent\n"
    killed.kill()
    killed.wait()
    killed.stdout.close()
    # Its backend has rolled back when no session is in a transaction any more.
    wait_until(
        lambda: (
            not database.value(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND state = 'idle in transaction'"
            )
        ),
        timeout=10,
    )
    database.send(channel, "alive")
    assert [(e.data, e.eids) for e in client.wait_count(1)] == [("alive", {channel: 1})]


KILLED_SENDER = """
import sys, time
import django
django.setup()
from django.db import transaction
from pg_eventstream import send_event
with transaction.atomic():
    send_event(sys.argv[1], "message", "never")
    print("sent", flush=True)
    time.sleep(60)
"""


def test_nothing_is_published_twice_after_an_orderly_restart(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    for n in range(3):
        publisher = new_publisher().lead()
        database.send(channel, str(n))
        client.wait_count(n + 1)
        publisher.stop()
        assert publisher.returncode == 0
    acknowledged = database.value("SELECT position FROM pg_eventstream_proxy")
    assert acknowledged == database.value("SELECT max(position) FROM pg_eventstream_stream") == 3
    assert [event.data for event in client.events] == ["0", "1", "2"]


def test_events_that_somebody_else_has_sequenced_are_published(
    database: Database,
    publisher: PublisherProcess,
    stream: OpenStream,
    channel: str,
) -> None:
    """Any role with the right can call it: a script, or a person in psql."""
    client = stream(channel).wait_open()
    for n in range(3):
        with database.connect(autocommit=False) as connection:
            connection.execute("SET LOCAL pg_eventstream.bell = off")
            connection.execute(
                "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s)", [channel, n]
            )
            connection.commit()
            connection.execute("SELECT pg_eventstream_sequence()")
            connection.commit()
        client.wait_count(n + 1)
    assert [event.data for event in client.events] == ["0", "1", "2"]


def test_once_publishes_what_is_there(
    database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    send_events([(channel, "message", n) for n in range(1500)])
    once = new_publisher("--once")
    once.start()
    wait_until(lambda: not once.running, timeout=30)
    assert once.returncode == 0, once.log
    assert "1500 events published." in once.log
    assert [event.data for event in client.wait_count(1500)] == [str(n) for n in range(1500)]


def test_once_leaves_a_running_publisher_alone(
    database: Database, publisher: PublisherProcess, new_publisher: NewPublisher
) -> None:
    once = new_publisher("--once")
    once.start()
    wait_until(lambda: not once.running, timeout=30)
    assert once.returncode == 1
    assert "leads and publishes already" in once.log
