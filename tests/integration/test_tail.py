"""The tail begins where it is told to, follows exactly its channels, and says what is wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import StringIO
from itertools import islice
from typing import Any

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.test import override_settings

from pg_eventstream import sse
from pg_eventstream.conf import conf, proxy_name
from pg_eventstream.operate.events import tail as tail_module
from pg_eventstream.operate.events.tail import Since, Tail, TailedEvent, parse_since
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.postgres.listener import Listener
from pg_eventstream.postgres.locks import LEADER_LOCK, LOCK_SPACE
from pg_eventstream.postgres.places import first_since
from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database
from tests.support.roles import as_role, granted
from tests.support.rounds import prune, sequence
from tests.support.stored import age

HEARD = "No publisher leads"


class Stop(BaseException):
    """Ends a tail in the tests."""


def new_tail(
    channels: list[str] | None = None,
    since: Since = "earliest",
    *,
    most: int | None = None,
    say: Callable[[str], object] = lambda message: None,
) -> Tail:
    return Tail(Connector("default"), channels, since, most=most, say=say)


def stored(channels: list[str] | None = None, since: Since = "earliest", **more: Any) -> list[str]:
    """The data of the events that a tail shows before it waits."""
    shown: list[TailedEvent] = []
    with ended_when_it_waits():
        try:
            for events in new_tail(channels, since, **more).follow():
                shown += events
        except Stop:
            pass
    return [event.data for event in shown]


@contextmanager
def ended_when_it_waits() -> Iterator[None]:
    class Ends(Listener):
        def wait(self, timeout: float | None) -> set[str]:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail_module, "Listener", Ends)
        yield


class Following:
    """A tail that runs in a thread, from a `with` block on."""

    def __init__(self, database: Database, **options: Any) -> None:
        self._database = database
        self._options = options
        self._stopping = False
        self.events: list[TailedEvent] = []
        self.said: list[str] = []

    def __enter__(self) -> Following:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.wait_until_it_waits()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping = True
        while self._thread.is_alive():
            self.cut()
            self._thread.join(0.1)

    def cut(self) -> None:
        """End its session of the database."""
        self._database.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'pg_eventstream tail'"
        )

    def wait_until_it_waits(self) -> None:
        looks = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'pg_eventstream tail' AND state = 'idle'"
            " AND query LIKE '%%pg_stat_activity%%'"
        )
        wait_until(lambda: self._database.value(looks) == 1, timeout=20)

    def wait_for(self, *data: str) -> None:
        wait_until(lambda: [event.data for event in self.events] == [*data], timeout=20)

    def _say(self, message: str) -> None:
        self.said.append(message)
        if self._stopping:
            raise Stop

    def _run(self) -> None:
        try:
            for events in new_tail(**{"since": None, **self._options}, say=self._say).follow():
                self.events += events
        except Stop:
            pass


def send(database: Database, channel: str, *data: str) -> None:
    for text in data:
        database.send(channel, text)
    sequence(database)


# Where it begins


def test_places(database: Database) -> None:
    send(database, "old", "1", "2")
    age(database, events_of="old", by=timedelta(hours=3))
    send(database, "a", "3")
    age(database, events_of="a", by=timedelta(minutes=30))
    send(database, "b", "4", "5")
    send(database, "a", "6")
    everything = ["1", "2", "3", "4", "5", "6"]
    places: dict[str | None, list[str]] = {
        None: [],
        "earliest": everything,
        "4h": everything,
        "1d": everything,
        "1h": everything[2:],
        "10m": everything[3:],
        "0s": [],
        "a:0": everything[2:],
        "a:1": everything[3:],
        "a:2": [],
        "b:1": everything[4:],
        "b:1,a:1": everything[4:],
        "old:1": everything[1:],
    }
    for place, shown in places.items():
        assert stored(since=parse_since(place, [])) == shown, place


def test_composite_id_shows_no_event_twice_and_leaves_none_out(database: Database) -> None:
    for n in range(4):
        send(database, "a", f"a{n}")
        send(database, "b", f"b{n}")
    assert stored(["a", "b"], {"a": 3, "b": 1}) == ["b1", "b2", "a3", "b3"]


def test_only_its_channels(database: Database) -> None:
    send(database, "a", "1")
    send(database, "ab", "2")
    send(database, "A", "3")
    send(database, "b", "4")
    assert stored(["a", "b"]) == ["1", "4"]
    assert stored(["c"]) == []


def test_pages_follow_each_other(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_module, "_PAGE_EVENTS", 3)
    monkeypatch.setattr(tail_module, "_PAGE_BYTES", 1000)
    data = [str(n) * (600 if n % 3 else 3000) for n in range(10)]
    send(database, "a", *data)
    send(database, "b", *"xxxxxxxx")
    assert stored(["a"]) == data
    assert stored(most=10) == [text[:10] for text in data] + [*"xxxxxxxx"]
    assert stored(["b"]) == [*"xxxxxxxx"]


def test_id_that_is_not_stored_is_reported(database: Database) -> None:
    send(database, "a", "1", "2")
    prune()
    send(database, "a", "3")
    for number, shown in {1: "a:1", 5 * sse.INCARNATION + 3: "a:5000000000003"}.items():
        said: list[str] = []
        assert stored(["a"], {"a": number}, say=said.append) == ["3"]
        assert said[0] == (
            f"The event {shown} is not stored: it was pruned, or was never sent. Its channel begins"
            " with the next event that is stored."
        )


def test_time_is_found_with_few_looks(database: Database) -> None:
    database.execute(
        """
        INSERT INTO pg_eventstream_stream (position, channel, eid, event_id, sequenced_at)
        SELECT n * 3, 'a', n, n, timestamptz '2026-01-01 00:00Z' + n * interval '1 second'
          FROM generate_series(1000, 9000) AS n WHERE n % 7 <> 0
        """
    )
    with database.connect() as connection:
        looks = 0

        def fetch(query: str, params: list[Any]) -> Any:
            nonlocal looks
            looks += 1
            return connection.execute(query, params).fetchone()

        (begin,) = fetch("SELECT timestamptz '2026-01-01 00:00Z'", [])
        for second, first in {0: 1000, 1000: 1000, 5001: 5001, 5005: 5006, 9000: 9000}.items():
            looks = 0
            moment = begin + timedelta(seconds=second)
            assert first_since(fetch, moment) == first * 3
            assert first_since(fetch, moment, "a") == first
            assert looks < 50
        assert first_since(fetch, begin + timedelta(seconds=9001)) is None
        assert first_since(fetch, begin, "b") is None


# What it shows


def test_ids_and_times(database: Database) -> None:
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids, meta)"
        """ VALUES ('a b', 'paid', '7', '{1}', '{"cause": 1}')"""
    )
    sequence(database)
    database.execute("UPDATE pg_eventstream_stream SET incarnation = 5 * 10^12")
    with ended_when_it_waits():
        [event] = next(new_tail().follow())
    assert (event.id, event.type, event.data) == ("a%20b:5000000000001", "paid", "7")
    assert (event.skip_user_ids, event.meta) == (["1"], {"cause": 1})
    assert event.committed is not None
    assert event.created <= event.committed == event.begun
    assert event.published is None
    database.execute("UPDATE pg_eventstream_stream SET committed_at = NULL")
    with ended_when_it_waits():
        [event] = next(new_tail().follow())
    assert event.begun == event.created


@override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Volatile")
def test_unreliable_channel_has_no_ids(database: Database) -> None:
    send(database, "volatile", "1")
    with ended_when_it_waits():
        [event] = next(new_tail().follow())
    assert event.id is None


URLS = [{"control_uri": "http://one.example:5561"}, {"control_uri": "http://two.example:5561"}]


def acknowledge(database: Database, *proxies: str) -> None:
    for name in proxies:
        database.execute(
            "INSERT INTO pg_eventstream_proxy (name, position, incarnation)"
            " SELECT %s, position, incarnation FROM pg_eventstream_cursor"
            " ON CONFLICT (name) DO UPDATE SET position = excluded.position",
            [name],
        )


@override_settings(GRIP_PROXIES=URLS)
def test_event_is_held_until_all_proxies_have_acknowledged_it(database: Database) -> None:
    one, two = map(proxy_name, conf.grip_proxies)
    with Following(database) as tail:
        send(database, "a", "1")
        acknowledge(database, one, two)
        tail.wait_for("1")
        within = tail.events[0].published_within
        assert tail.events[0].published
        assert within is not None
        assert within > tail.events[0].sequenced_after
        send(database, "a", "2")
        acknowledge(database, one)
        tail.wait_for("1", "2")
        assert tail.events[1].published is False


@override_settings(GRIP_PROXIES=URLS)
def test_older_events_are_not_held(database: Database) -> None:
    send(database, "a", "1")
    acknowledge(database, *map(proxy_name, conf.grip_proxies))
    send(database, "a", "2")
    age(database, events_of="a", by=timedelta(minutes=1))
    with ended_when_it_waits():
        first, second = next(new_tail().follow())
    assert (first.published, first.published_within) == (True, None)
    assert second.published is False


# Following


def test_new_events_are_shown_and_a_lost_connection_is_replaced(database: Database) -> None:
    with Following(database) as tail:
        send(database, "a", "1", "2")
        tail.wait_for("1", "2")
        tail.cut()
        send(database, "a", "3")
        tail.wait_for("1", "2", "3")
        lost, again = (text for text in tail.said if not text.startswith(HEARD))
        assert lost.startswith("database: ")
        assert lost.endswith("; connecting again")
        assert again == "connected again"


def test_another_stream_is_noticed(database: Database) -> None:
    with Following(database) as tail:
        send(database, "a", *"123")
        tail.wait_for(*"123")
        database.execute(
            "TRUNCATE pg_eventstream_event, pg_eventstream_outbox, pg_eventstream_stream,"
            " pg_eventstream_channel, pg_eventstream_cursor"
        )
        send(database, "a", "new")
        tail.wait_for(*"123", "new")
        assert any(text.endswith("continuing with the new one") for text in tail.said)


def test_it_says_once_that_nobody_sequences(database: Database) -> None:
    with Following(database) as tail:
        wait_until(lambda: tail.said != [], timeout=20)
        send(database, "a", "1")
        tail.wait_for("1")
        send(database, "a", "2")
        tail.wait_for("1", "2")
        assert [text.partition(" and")[0] for text in tail.said] == [HEARD]


@pytest.mark.parametrize("kind", ["leader", "hub", "leader through a pooler"])
def test_it_does_not_say_so_if_something_sequences(database: Database, kind: str) -> None:
    with database.connect(application_name="pg_eventstream hub" if kind == "hub" else "") as other:
        if kind == "leader":
            other.execute(f"SELECT pg_advisory_lock({LOCK_SPACE}, {LEADER_LOCK})")
        if kind == "leader through a pooler":
            other.execute("INSERT INTO pg_eventstream_publisher VALUES (1, 'a:1', now(), now())")
        with Following(database) as tail:
            assert tail.said == []


def test_error_that_connecting_again_does_not_cure_ends_it(database: Database) -> None:
    database.execute("DROP TABLE pg_eventstream_proxy")
    send(database, "a", "1")
    with override_settings(GRIP_PROXIES=URLS), pytest.raises(psycopg.errors.UndefinedTable):
        next(new_tail().follow())


@override_settings(GRIP_PROXIES=URLS)
def test_role_of_an_endpoint_may_follow(database: Database) -> None:
    role = granted(database, "endpoint")
    send(database, "a", "1")
    acknowledge(database, *map(proxy_name, conf.grip_proxies))
    tail = Tail(
        Connector("default", as_role(database, role)),
        None,
        {"a": 0},
        most=None,
        say=lambda message: None,
    )
    with ended_when_it_waits():
        first, looked = islice(tail.follow(), 2)
    assert [event.data for event in first] == ["1"]
    assert looked == []  # after a look at who sequences


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name the channels to follow, or use --all"),
        (["a", "--all"], "Name the channels to follow, or use --all"),
        (["--all", "--since", "yesterday"], "'yesterday' is neither an age"),
        (["a", "--since", "b:7"], "an id of 'b', which is not among the channels"),
        (["a\nb"], "must not contain CR, LF or NUL"),
        (["a", "--database", "nowhere"], "is not in DATABASES"),
    ],
)
def test_wrong_arguments(database: Database, arguments: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        call_command("eventstream_tail", *arguments, stdout=StringIO())


def test_first_connection_that_fails_ends_it(database: Database) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(connections["default"].settings_dict, "NAME", "of_nobody")
        with pytest.raises(CommandError, match='"of_nobody" does not exist'):
            call_command("eventstream_tail", "--all", stdout=StringIO())
