"""Unreliable channels through a proxy: no ids, pruned soon; and still transactional."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from django.db import transaction
from django.test import override_settings

from pg_eventstream import permission, send_event
from pg_eventstream.limits import Limits
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.servers.processes import wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.environment import KEY, settings_everywhere
from tests.support.origin import log_in
from tests.support.publisher import PublisherProcess
from tests.support.rounds import sequence
from tests.support.sse_client import OpenStream, SSEClient


@pytest.fixture(autouse=True)
def volatile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make channels whose names begin with "volatile" unreliable, here and in the servers."""
    manager = "tests.project.channelmanagers.Volatile"
    with settings_everywhere(monkeypatch, EVENTSTREAM_CHANNELMANAGER_CLASS=manager):
        yield


def send(channel: str, *texts: str, skip: int | None = None) -> None:
    for text in texts:
        send_event(channel, "message", text, [skip] if skip else None, json_encode=False)


def texts(client: SSEClient) -> list[str]:
    return [event.data for event in client.events]


def own(client: SSEClient, name: str) -> list[int]:
    """The numbers at the end of the texts that begin with the name."""
    return [int(text.split()[-1]) for text in texts(client) if text.startswith(f"{name} ")]


def send_until_received(client: SSEClient, channel: str, text: str) -> None:
    """Send the event again each second, because a stream that asks how to continue can lose it."""
    deadline = time.monotonic() + 30
    while True:
        with suppress(AssertionError):
            client.wait_for(lambda: text in texts(client), timeout=1)
            return
        assert time.monotonic() < deadline, f"{text!r} was never received"
        send(channel, text)


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
    for name in names[:2]:
        client.wait_for(lambda name=name: own(client, name)[-1:] == [29])  # type: ignore[misc]
        assert own(client, name) == list(range(30))
    # The proxy can lose some of the others while the stream asks how to continue.
    send_until_received(client, names[2], f"{names[2]} 30")
    received = own(client, names[2])
    assert received == sorted(set(received))
    for event in client.events:
        # An event without an id leaves the client with the id of the event before.
        assert set(event.eids) <= set(names[:2]) or event.id == ""

    # A client that reconnects gets the events of reliable channels that it missed. Those of the
    # other channel were published while it was away: a client that stayed has them.
    stayed = stream(names[2]).wait_open()
    client.close()
    for name in names:
        send(name, f"{name} missed", f"{name} missed too")
    stayed.wait_count(2)
    again = stream(*names, last_event_id=client.last_event_id).wait_open()
    again.wait_count(4)
    send_until_received(again, names[2], "live")
    assert sorted(texts(again)[:4]) == sorted(
        f"{name} missed{too}" for name in names[:2] for too in ("", " too")
    )
    assert set(texts(again)[4:]) == {"live"}


def test_gap_in_a_reliable_channel_is_still_found_together_with_an_unreliable_one(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(channel, f"volatile{channel}").wait_open()
    send(channel, "1")
    client.wait_count(1)
    publisher.kill()
    send(channel, "never published")
    sequence(database)
    database.execute(
        "UPDATE pg_eventstream_proxy SET position = 2"
    )  # as if it had been acknowledged
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
    """The proxy shares one request among sessions whose links have the same path."""
    users = [log_in(f"user{n}") for n in range(6)]
    clients = [
        stream(f"volatile{channel}-{user.pk}", headers={"Cookie": cookie}).wait_open()
        for user, cookie in users
    ]
    for round_ in range(3):
        with transaction.atomic():  # all their streams ask the origin at the same time
            for user, _ in users:
                permission.channel_permission_changed(user, f"volatile{channel}-{user.pk}")
        with transaction.atomic():
            for user, _ in users:
                send(f"volatile{channel}-{user.pk}", f"{round_} for {user.pk}")
        for (user, _), client in zip(users, clients, strict=True):
            send_until_received(client, f"volatile{channel}-{user.pk}", f"{round_} for {user.pk}")
    for (user, _), client in zip(users, clients, strict=True):
        own = [f"{n} for {user.pk}" for n in range(3)]
        assert set(texts(client)) == set(own)
    assert {client.connections for client in clients} == {1}


# Pruned soon


def kept(database: Database) -> list[str]:
    return [row[0] for row in database.fetch("SELECT data FROM pg_eventstream_event ORDER BY id")]


def test_running_publisher_prunes_unreliable_events(
    database: Database, pushpin: Pushpin, channel: str
) -> None:
    send(f"volatile{channel}", *(str(n) for n in range(300)))
    send(channel, "stays")
    sequence(database)
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 hour'")
    with override_settings(GRIP_URL=f"{pushpin.control_url}?key={KEY}"):
        publisher = Publisher(Connector("default", limits=Limits(prune=0.2)))
        thread = threading.Thread(target=publisher.run)
        thread.start()
        try:
            wait_until(lambda: kept(database) == ["stays"], timeout=30)
        finally:
            publisher.stop()
            thread.join()
