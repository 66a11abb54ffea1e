"""The publisher as a process: unreachable proxies, signals, and an unreachable database."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pg_eventstream import send_event, send_events
from pg_eventstream.limits import LIMITS
from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.environment import KEY
from tests.support.publisher import NewPublisher
from tests.support.sse_client import OpenStream, SSEClient


def test_dead_proxy_delays_no_other_and_gets_everything_when_it_is_back(
    database: Database,
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    second_pushpin: Pushpin,
    stream: OpenStream,
    channel: str,
) -> None:
    urls = " ".join(f"{p.control_url}?key={KEY}" for p in (second_pushpin, pushpin))
    first = stream(channel).wait_open()
    publisher = new_publisher(PG_EVENTSTREAM_TEST_GRIP_URL=urls).lead()
    for n in range(50):
        send_event(channel, "message", n)
    assert [event.data for event in first.wait_count(50, timeout=10)] == list(map(str, range(50)))
    publisher.wait_for_log("cannot be reached")

    second_pushpin.start()
    with SSEClient(f"{second_pushpin.url}/events/", [channel]) as second:
        second.wait_open()
        publisher.wait_for_log("takes events again")
        send_event(channel, "message", "both")
        assert first.wait_count(51)[-1].data == '"both"'
        assert second.wait_count(1)[-1].data == '"both"'
        assert second.events[-1].eids == {channel: 51}
    wait_until(
        lambda: database.fetch("SELECT DISTINCT position FROM pg_eventstream_proxy") == [(51,)],
        timeout=20,
    )


def test_what_the_proxy_has_not_taken_is_published_by_the_next_publisher(
    database: Database, control: ControlPort, new_publisher: NewPublisher
) -> None:
    """Not even if the channel has no other event that would reveal the gap."""
    control.silent.set()
    publisher = new_publisher(PG_EVENTSTREAM_TEST_GRIP_URL=control.url).lead()
    send_events(("a", "message", n) for n in range(250))
    wait_until(lambda: len(control.bodies) == 1, timeout=20)
    publisher.kill()
    control.silent.clear()
    publisher.lead()
    wait_until(lambda: len(control.ids) >= 250, timeout=20)
    assert control.ids[:250] == [str(n) for n in range(1, 251)]


@pytest.mark.faults
@pytest.mark.thorough
def test_hints_that_a_killed_publisher_owed_come_from_the_next_one(
    database: Database, control: ControlPort, new_publisher: NewPublisher
) -> None:
    publisher = new_publisher(PG_EVENTSTREAM_TEST_GRIP_URL=control.url).lead()
    send_events(("burst", "message", n) for n in range(60))
    send_events(("quiet", "message", n) for n in range(40))
    send_event("large", "message", "x" * LIMITS.event_bytes)
    acknowledged = "SELECT position FROM pg_eventstream_proxy"
    wait_until(lambda: database.value(acknowledged) == 101, timeout=20)
    publisher.kill()
    del control.items[:]
    publisher.lead()
    for _ in ("soon", "later"):
        wait_until(lambda: len(control.items) == 2, timeout=20)
        assert hinted(control) == ["events-burst", "events-large"]
        del control.items[:]
    send_event("quiet", "message", "next")
    wait_until(lambda: control.ids == ["41"], timeout=20)


def hinted(control: ControlPort) -> list[str]:
    """The channels for which there was a hint."""
    hint = {"action": "hint"}
    return sorted(i["channel"] for i in control.items if i["formats"]["http-stream"] == hint)


def test_sigterm_ends_a_publisher_whose_proxy_is_silent(
    database: Database, control: ControlPort, new_publisher: NewPublisher
) -> None:
    control.silent.set()
    publisher = new_publisher(PG_EVENTSTREAM_TEST_GRIP_URL=control.url).lead()
    send_event("a", "message", 1)
    wait_until(lambda: len(control.bodies) == 1, timeout=20)
    os.kill(publisher.pid, signal.SIGTERM)
    wait_until(lambda: not publisher.running, timeout=5)
    assert publisher.returncode == 0


def test_second_signal_ends_the_publisher_at_once(
    database: Database, control: ControlPort, new_publisher: NewPublisher
) -> None:
    control.silent.set()
    publisher = new_publisher(PG_EVENTSTREAM_TEST_GRIP_URL=control.url).lead()
    send_event("a", "message", 1)
    wait_until(lambda: len(control.bodies) == 1, timeout=20)
    os.kill(publisher.pid, signal.SIGINT)
    publisher.wait_for_log("stopping")
    os.kill(publisher.pid, signal.SIGINT)
    wait_until(lambda: not publisher.running, timeout=5)
    assert publisher.returncode == 128 + signal.SIGINT


def test_publisher_waits_for_the_database(
    new_publisher: NewPublisher, database: Database, tmp_path: Path
) -> None:
    publisher = new_publisher("--dsn=host=127.0.0.1 port=1 connect_timeout=2")
    publisher.start()
    publisher.wait_for_log("connecting again")
    assert publisher.running
    publisher.stop()
    assert publisher.returncode == 0


def test_missing_tables_are_explained_and_waited_for(
    new_publisher: NewPublisher, database: Database, postgres: Postgres
) -> None:
    publisher = new_publisher(f"--dsn={postgres.dsn()}")  # a database without the tables
    publisher.start()
    publisher.wait_for_log("are the migrations applied here?")
    assert publisher.running


def test_publisher_takes_a_dsn(
    new_publisher: NewPublisher, database: Database, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    environment = {"PG_EVENTSTREAM_TEST_DSN": "host=127.0.0.1 port=1 dbname=nowhere"}
    new_publisher(f"--dsn={database.dsn}", **environment).lead()
    send_event(channel, "message", 1)
    client.wait_count(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--database=nowhere"], "The database 'nowhere' is not in DATABASES"),
        (["--database=default", "--dsn=x"], "not allowed with argument"),
    ],
)
def test_wrong_arguments_are_explained(
    new_publisher: NewPublisher, database: Database, arguments: list[str], message: str
) -> None:
    publisher = new_publisher(*arguments)
    publisher.start()
    wait_until(lambda: not publisher.running, timeout=20)
    assert publisher.returncode != 0
    assert message in publisher.log
