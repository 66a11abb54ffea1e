"""Unreliable channels: no ids, no replay, gone soon; and still transactional."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from io import StringIO

import pytest
from django.core.management import call_command
from django.db import transaction
from django.test import override_settings

from pg_eventstream import get_current_event_id, get_events, permission, send_event
from pg_eventstream.postgres.connector import Database as Where
from pg_eventstream.publisher import daemon as publisher_module
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.publisher.pruner import Sweep
from pg_eventstream.servers.processes import wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.project.channelmanagers import Volatile
from tests.support.database import Database
from tests.support.environment import KEY
from tests.support.origin import Origin, behind_a_proxy, log_in
from tests.support.publisher import PublisherProcess
from tests.support.rounds import sequence
from tests.support.sse_client import OpenStream, SSEClient


@pytest.fixture(autouse=True)
def volatile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Channels whose name begins with "volatile" are unreliable, here and in the servers."""
    settings = {"EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channelmanagers.Volatile"}
    monkeypatch.setenv("PG_EVENTSTREAM_TEST_SETTINGS", json.dumps(settings))
    with override_settings(**settings):
        yield


def send(channel: str, *texts: str, skip: int | None = None) -> None:
    for text in texts:
        send_event(channel, "message", text, [skip] if skip else None, json_encode=False)


def texts(client: SSEClient) -> list[str]:
    return [event.data for event in client.events]


def test_unreliable_event_has_no_id_and_is_delivered_if_its_transaction_commits(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(f"volatile{channel}").wait_open()
    assert client.control[0].id == ""
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        send(f"volatile{channel}", "rolled back")
        _ = 1 / 0
    odd = ["100 %", "%I %(x)s %%", "ü🎉 ключ", "<p>\n  two lines\n</p>", ""]
    send(f"volatile{channel}", *odd)
    client.wait_count(len(odd))
    assert texts(client) == odd
    assert {event.id for event in client.events} == {""}
    assert client.connections == 1


def test_unreliable_and_reliable_channels_of_one_stream_do_not_disturb_each_other(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    names = [channel, f"more{channel}", f"volatile{channel}"]
    client = stream(*names).wait_open()
    assert client.control[0].eids == {channel: 0, f"more{channel}": 0}
    for n in range(30):
        for name in names:
            send(name, f"{name} {n}")
    client.wait_count(90)
    for name in names:
        own = [text for text in texts(client) if text.startswith(f"{name} ")]
        assert own == [f"{name} {n}" for n in range(30)]
    for event in client.events:
        # An event without an id leaves the client with that of the event before.
        assert set(event.eids) <= set(names[:2]) or event.id == ""

    # A client that comes back gets what it missed of the reliable ones. What it missed of the
    # other was published while it was away: somebody who stayed has it.
    stayed = stream(names[2]).wait_open()
    client.close()
    for name in names:
        send(name, f"{name} missed", f"{name} missed too")
    stayed.wait_count(2)
    again = stream(*names, last_event_id=client.last_event_id).wait_open()
    again.wait_count(4)
    send(names[2], "live")
    again.wait_count(5)
    assert sorted(texts(again)[:4]) == sorted(
        f"{name} missed{too}" for name in names[:2] for too in ("", " too")
    )
    assert texts(again)[4] == "live"


def test_gap_in_a_reliable_channel_is_still_found_beside_an_unreliable_one(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(channel, f"volatile{channel}").wait_open()
    send(channel, "1")
    client.wait_count(1)
    publisher.kill()
    send(channel, "never published")
    sequence(database)
    database.execute("UPDATE pg_eventstream_proxy SET position = 2")  # as if it had been
    publisher.lead()
    send(channel, "3")
    client.wait_count(3)
    assert texts(client) == ["1", "never published", "3"]


def test_users_are_skipped_on_unreliable_channels_too(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    ann, cookie = log_in("ann")
    client = stream(f"volatile{channel}", headers={"Cookie": cookie}).wait_open()
    others = stream(f"volatile{channel}").wait_open()
    send(f"volatile{channel}", "not for ann", skip=ann.pk)
    send(f"volatile{channel}", "for all")
    others.wait_count(2)
    client.wait_count(1)
    assert texts(client) == ["for all"]


def test_private_unreliable_channels_stay_private_when_all_next_links_are_fetched_at_once(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    """The proxy shares one fetch among sessions whose links have the same path."""
    users = [log_in(f"user{n}") for n in range(6)]
    clients = [
        stream(f"volatile{channel}-{user.pk}", headers={"Cookie": cookie}).wait_open()
        for user, cookie in users
    ]
    for round_ in range(3):
        with transaction.atomic():  # all their streams ask the origin at the same moment
            for user, _ in users:
                permission.channel_permission_changed(user, f"volatile{channel}-{user.pk}")
        with transaction.atomic():
            for user, _ in users:
                send(f"volatile{channel}-{user.pk}", f"{round_} for {user.pk}")
        for (user, _), client in zip(users, clients, strict=True):
            expected = [f"{n} for {user.pk}" for n in range(round_ + 1)]
            client.wait_count(len(expected))
            assert texts(client) == expected
    assert {client.connections for client in clients} == {1}


@behind_a_proxy
def test_unreliable_events_are_not_replayed(database: Database) -> None:
    for name in ("volatile", "reliable"):
        send(name, "1", "2")
    sequence(database)
    origin = Origin()
    for start in ("earliest", "volatile:0,reliable:0"):
        answer = origin.open("volatile", "reliable", last_event_id=start)
        assert [event.eids for event in answer.events] == [{"reliable": 1}, {"reliable": 2}]
        assert answer.held
        assert origin.follow(answer).held
    answer = origin.open("volatile", last_event_id="volatile:1")
    assert answer.held
    assert answer.events == []
    assert answer.control["stream-open"].id == ""
    assert origin.follow(answer).held
    assert get_current_event_id(["volatile", "reliable"]) == "reliable:2"
    assert len(get_events(["volatile", "reliable"], "earliest").events) == 2


# Pruned soon


def kept(database: Database) -> list[str]:
    return [row[0] for row in database.fetch("SELECT data FROM pg_eventstream_event ORDER BY id")]


@pytest.mark.parametrize("taken", [0, 4])
def test_unreliable_events_are_pruned_after_a_minute_whoever_took_them(
    database: Database, channel: str, taken: int
) -> None:
    # Not sooner: a process that streams by itself may not have read yet what a proxy has.
    send(f"volatile{channel}", "1", "2", "3")
    send(channel, "stays")
    sequence(database)
    database.execute("INSERT INTO pg_eventstream_proxy VALUES ('near', %s)", [taken])

    def make_older(seconds: int, condition: str) -> None:
        database.execute(
            "UPDATE pg_eventstream_stream"
            f" SET sequenced_at = now() - interval '{seconds} seconds' WHERE {condition}"
        )

    with behind_a_proxy:
        make_older(57, "true")
        call_command_quietly("eventstream_prune")
        assert kept(database) == ["1", "2", "3", "stays"]
        make_older(61, "position <= 2")
        call_command_quietly("eventstream_prune")
        assert kept(database) == ["3", "stays"]
        make_older(61, "true")
        call_command_quietly("eventstream_prune")
    assert kept(database) == ["stays"]
    assert database.value("SELECT count(*) FROM pg_eventstream_stream") == 1


def call_command_quietly(name: str) -> None:
    call_command(name, stdout=StringIO())


def test_running_publisher_prunes_unreliable_events_by_itself(
    database: Database, pushpin: Pushpin, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "_SWEEP_SECONDS", 0.2)
    send(f"volatile{channel}", *(str(n) for n in range(300)))
    send(channel, "stays")
    sequence(database)
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 hour'")
    with override_settings(GRIP_URL=f"{pushpin.control_url}?key={KEY}"):
        publisher = Publisher(Where("default"))
        thread = threading.Thread(target=publisher.run)
        thread.start()
        try:
            wait_until(lambda: kept(database) == ["stays"], timeout=30)
        finally:
            publisher.stop()
            thread.join()


def test_channel_that_becomes_reliable_does_not_use_an_id_again(
    database: Database, channel: str
) -> None:
    name = f"volatile{channel}"
    send(name, "1", "2")
    sequence(database)
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 hour'")
    call_command_quietly("eventstream_prune")
    with override_settings(
        EVENTSTREAM_CHANNELMANAGER_CLASS="pg_eventstream.channelmanager.DefaultChannelManager"
    ):
        send(name, "3")
        sequence(database)
        assert get_current_event_id([name]) == f"{name}:3"


def test_manager_that_fails_stops_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Volatile, channel: str) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(Volatile, "is_channel_reliable", fail)
    send("volatile", "kept")
    sequence(database)
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 hour'")
    call_command_quietly("eventstream_prune")
    assert kept(database) == ["kept"]
    assert "is_channel_reliable('volatile') failed" in caplog.text


@pytest.mark.parametrize("proxied", [False, True])
def test_change_of_permission_is_kept_like_a_reliable_event(
    database: Database, channel: str, proxied: bool
) -> None:
    # However late a proxy or a process is, it ends the streams that may not go on.
    permission.channel_permission_changed(None, channel)
    sequence(database)
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '23 hours'")
    database.execute("INSERT INTO pg_eventstream_proxy VALUES ('near', 1)")
    with behind_a_proxy if proxied else nullcontext():
        call_command_quietly("eventstream_prune")
        assert len(kept(database)) == 1
        database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '25 h'")
        call_command_quietly("eventstream_prune")
    assert kept(database) == []


def test_no_id_is_used_again_when_a_channel_was_taken_for_reliable_for_a_while(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Volatile, channel: str) -> bool:
        raise ZeroDivisionError

    with database.connect() as connection:
        sweep = Sweep(connection)

        def send_and_sweep() -> list[int]:
            send("volatile", "x", "y")
            sequence(database)
            eids = database.fetch("SELECT eid FROM pg_eventstream_stream ORDER BY position")
            database.execute(
                "UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 hour'"
            )
            sweep.run_once()
            return [eid for (eid,) in eids][-2:]

        with monkeypatch.context() as failing:
            failing.setattr(Volatile, "is_channel_reliable", fail)
            assert send_and_sweep() == [1, 2]
        assert [send_and_sweep() for _ in range(3)] == [[3, 4], [5, 6], [7, 8]]


def test_sweep_that_goes_on_skips_no_event(database: Database) -> None:
    with database.connect() as connection:
        sweep = Sweep(connection)
        for _ in range(3):
            send("volatile", "x")
            sequence(database)
            database.execute(
                "UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '61 seconds'"
            )
            assert sweep.run_once() == 1
