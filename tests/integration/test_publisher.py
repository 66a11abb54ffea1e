"""The publisher and its proxies: each gets everything in order, independent of the others."""

from __future__ import annotations

import json
import threading
from typing import Any

import jwt
import psycopg
import pytest
from django.test import override_settings

from pg_eventstream import send_event, send_events
from pg_eventstream.conf import conf
from pg_eventstream.grip.proxy import Proxy
from pg_eventstream.limits import LIMITS, Limits
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.postgres.sequence import sequence
from pg_eventstream.publisher import daemon, pruner
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.publisher.feed import Feed
from pg_eventstream.servers.processes import wait_until
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.rounds import publish_once


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, [4, 5]),
        # Known proxies wait for events that they have not taken, even old ones.
        ({"the same": 2}, [3, 4, 5]),
        # A new one can be a known one with a new address.
        ({"another": 4}, [5]),
        ({"another": 1}, [4, 5]),
        ({"another": 1, "a third": 4}, [4, 5]),
        # From a stream that was longer.
        ({"another": 1000}, [4, 5]),
    ],
)
def test_unknown_proxy_begins_where_streams_have_not_asked_yet(
    database: Database, control: ControlPort, known: dict[str, int], expected: list[int]
) -> None:
    """Not with all stored events, which could be millions before the first new one."""
    for n in range(1, 6):
        database.send("c", str(n))
    database.execute("SELECT pg_eventstream_sequence()")
    database.execute(
        "UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '601 s'"
        " WHERE position <= 3"
    )
    for name, position in known.items():
        url = control.url if name == "the same" else f"http://{name}"
        database.execute(
            "INSERT INTO pg_eventstream_proxy (name, position) VALUES (%s, %s)", [url, position]
        )
    publish_once()
    assert control.ids == [str(n) for n in expected]


def test_start_without_proxies_forgets_none(database: Database, control: ControlPort) -> None:
    """A setting can be missing in one shell and present in the next."""
    database.send("c", "1")
    publish_once()
    database.send("c", "2")
    with override_settings(GRIP_URL=None):
        publish_once()
    publish_once()
    assert control.ids == ["1", "2"]


def test_batches_keep_order_and_stay_below_the_limits(
    database: Database, control: ControlPort
) -> None:
    send_events([("big", "message", "x" * 200_000) for _ in range(12)])
    send_events([("small", "message", n) for n in range(250)])
    assert publish_once() == 262
    events = [item for item in control.items if "id" in item]
    assert [(item["channel"], item["id"], item["prev-id"]) for item in events] == [
        *[("events-big", str(n), str(n - 1)) for n in range(1, 13)],
        *[("events-small", str(n), str(n - 1)) for n in range(1, 251)],
    ]
    assert max(len(body) for body in control.bodies) <= 900_100
    assert max(len(json.loads(body)["items"]) for body in control.bodies) <= 100


def test_unavailable_proxy_gets_the_same_batch_again(
    database: Database, control: ControlPort
) -> None:
    control.answers = [503, 500, 502]
    send_events([("a", "message", n) for n in range(10)])
    assert publish_once() == 10
    assert len(control.bodies) == 4
    assert len(set(control.bodies)) == 1
    assert control.ids == [str(n) for n in range(1, 11)]


def test_refused_event_is_replaced_by_a_hint_and_the_others_go_out(
    database: Database, control: ControlPort, caplog: pytest.LogCaptureFixture
) -> None:
    control.refused = "poison"
    send_events([("a", "message", "poison" if n == 33 else n) for n in range(1, 101)])
    assert publish_once() == 100
    expected: list[str | None] = [None if n == 33 else str(n) for n in range(1, 101)]
    # The burst's hint, for streams that could not follow it, comes last.
    assert control.ids == [*expected, None]
    assert control.items[32]["formats"] == {"http-stream": {"action": "hint"}}
    assert "refused event 33 of channel 'a'" in caplog.text


def test_event_over_the_proxys_limit_becomes_a_hint(
    database: Database, control: ControlPort
) -> None:
    send_events([("a", "message", "small"), ("a", "message", "x" * 5_000_000)])
    send_event("a", "message", "\x01" * 300_000, json_encode=False)  # six times as long in JSON
    send_event("a", "message", "small again")
    publish_once()
    # And one more, for a stream that was being opened when the others arrived.
    assert control.ids == ["1", None, None, "4", None]
    for hint in (control.items[1], control.items[4]):
        assert hint == {"channel": "events-a", "formats": {"http-stream": {"action": "hint"}}}


def test_hint_in_place_of_a_refused_event_is_repeated(
    database: Database, control: ControlPort
) -> None:
    control.refused = "poison"
    send_event("a", "message", "poison")
    publish_once()
    assert control.ids == [None, None]
    assert control.items[0] == control.items[1]


def test_page_that_is_cut_because_of_its_size_is_followed_by_the_next_at_once(
    database: Database, control: ControlPort
) -> None:
    """No notification is needed."""
    text = "x" * 390_000
    send_events([("big", "message", text)] * 30)
    over = threading.Event()
    with database.connect() as connection:
        sequence(connection)
        daemon.register(connection, "a test", [Proxy(config) for config in conf.grip_proxies])
    feed = Feed(
        Proxy(conf.grip_proxies[0]), Connector("default", limits=Limits(acknowledge=60)), over
    )
    thread = threading.Thread(target=feed.run)
    thread.start()
    try:
        wait_until(lambda: len(control.ids) >= 30, timeout=10)
    finally:
        over.set()
        feed.wake()
        thread.join()
    assert control.ids[:30] == [str(n) for n in range(1, 31)]


def test_publishing_is_authenticated_as_gripcontrol_does(
    database: Database, control: ControlPort
) -> None:
    key = "secret key, thirty-two bytes long"
    send_event("a", "message", 1)
    with override_settings(GRIP_URL=f"{control.url}/realm?iss=realm&key={key.replace(' ', '%20')}"):
        publish_once()
    scheme, token = control.headers[-1]["Authorization"].split()
    assert scheme == "Bearer"
    assert jwt.decode(token, key, algorithms=["HS256"])["iss"] == "realm"


def test_new_proxy_starts_where_the_slowest_one_is(
    database: Database, control: ControlPort
) -> None:
    send_events([("a", "message", n) for n in range(3)])
    publish_once()
    send_event("a", "message", "waits")
    with ControlPort() as renamed, override_settings(GRIP_URL=renamed.url):
        publish_once()
        assert renamed.ids == ["4"]
    assert database.fetch("SELECT name, position FROM pg_eventstream_proxy") == [(renamed.url, 4)]


def test_grip_url_and_grip_proxies_are_one_proxy_each(
    database: Database, control: ControlPort
) -> None:
    """django-grip appends GRIP_URL to the GRIP_PROXIES list with every request."""
    entry = {"control_uri": control.url}
    send_event("a", "message", 1)
    with override_settings(GRIP_PROXIES=[entry, dict(entry), dict(entry)]):
        publish_once()
    assert control.ids == ["1"]


def leading(connection: psycopg.Connection[Any], limits: Limits = LIMITS) -> Publisher:
    """What a publisher knows that leads on this connection."""
    daemon.register(connection, "test", [])
    return Publisher(Connector("default", limits=limits))


def test_notification_queue_that_fills_up_is_reported(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with database.connect() as leader, database.connect() as listener:
        publisher = leading(leader, Limits(queue_usage=0.0))  # of 8 GB, by default
        publisher._sequence_and_beat(leader)
        assert "notification queue" not in caplog.text
        listener.execute("LISTEN elsewhere")
        listener.execute("BEGIN")
        leader.execute(
            "SELECT pg_notify('elsewhere', repeat('x', 7000) || n) FROM "
            "generate_series(1, 100) AS n"
        )
        publisher._sequence_and_beat(leader)
    assert "notification queue" in caplog.text


def test_heartbeat_is_part_of_a_round(database: Database) -> None:
    with database.connect() as leader:
        publisher = leading(leader)
        leader.execute("UPDATE pg_eventstream_publisher SET heartbeat = now() - interval '1 hour'")
        send_event("a", "message", 1)
        sequenced, before = publisher._sequence_and_beat(leader)
        assert (sequenced, before.position) == (1, 0)
    assert database.fetch(
        "SELECT count(*) FROM pg_eventstream_publisher"
        " WHERE heartbeat > now() - interval '1 minute'"
    ) == [(1,)]


class Clock(threading.Event):
    """Time, which passes only while one waits."""

    now = 10_000.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now += timeout
        return False


def test_pruner_runs_rarely_when_nothing_happens_and_soon_when_something_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(pruner, "time", clock)

    def seconds_to_the_next_run(last_event_at: float) -> float:
        start = clock.now
        pruner._wait(clock, lambda: last_event_at, 0.0, LIMITS)
        return clock.now - start

    assert seconds_to_the_next_run(clock.now) == LIMITS.prune
    assert seconds_to_the_next_run(clock.now - 2 * LIMITS.quiet) == LIMITS.quiet_prune
    with override_settings(EVENTSTREAM_RETENTION=10 * 2 * LIMITS.prune):
        assert seconds_to_the_next_run(clock.now - 2 * LIMITS.quiet) == 2 * LIMITS.prune
