"""Who may read, and what happens to open streams when that changes."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.db import transaction

from pg_eventstream import (
    channel_permission_changed,
    send_event,
)
from pg_eventstream.channels import PERMISSION_CHANGES
from pg_eventstream.servers.processes import Process, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.project.app.models import Membership
from tests.project.channelmanagers import ObservedVolatile, SlowMembers
from tests.support.database import Database
from tests.support.environment import KEY
from tests.support.origin import log_in
from tests.support.publisher import NewPublisher, PublisherProcess
from tests.support.rounds import sequence
from tests.support.sse_client import OpenStream, SSEClient


@pytest.fixture(autouse=True, params=["Members"])
def manager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the channel manager of the test's servers; parametrize indirectly with another."""
    settings = {
        "EVENTSTREAM_CHANNELMANAGER_CLASS": f"tests.project.channelmanagers.{request.param}",
        "EVENTSTREAM_CHANNEL_LIMIT": 19,
    }
    monkeypatch.setenv("PG_EVENTSTREAM_TEST_SETTINGS", json.dumps(settings))


def pk(user: User | None) -> int | None:
    return None if user is None else user.pk


def join(user: User | None, *channels: str) -> None:
    Membership.objects.bulk_create(Membership(user_id=pk(user), channel=name) for name in channels)


def leave(user: User | None, channel: str) -> None:
    """Remove the user from the channel, as an application does."""
    with transaction.atomic():
        Membership.objects.filter(user_id=pk(user), channel=channel).delete()
        channel_permission_changed(user, channel)


def assert_ended(client: SSEClient, channel: str) -> None:
    assert client.ended.wait(10)
    error = client.control[-1]
    assert (error.type, error.id) == ("stream-error", "error")
    assert json.loads(error.data) == {
        "condition": "forbidden",
        "text": f"Permission denied to channels: {channel}",
        "channels": [channel],
    }


SELDOM = (pytest.mark.faults, pytest.mark.thorough)
ODD_NAMES = ["a b", "a,b;c:d", "ключ 🔑", '100% "%41" <x>', "line\ttab", "a/b?c#d"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("a,b;c:d", "ключ 🔑") else SELDOM)
        for name in ODD_NAMES
    ],
)
def test_revoked_user_loses_that_stream_at_once_and_no_other(
    publisher: PublisherProcess, stream: OpenStream, channel: str, name: str
) -> None:
    room, other_room = f"{channel}{name}", f"{channel}other{name}"
    ann, ann_cookie = log_in("ann")
    bob, bob_cookie = log_in("bob")
    join(ann, room, other_room)
    join(bob, room)
    join(None, room)
    ended = stream(room, headers={"Cookie": ann_cookie}).wait_open()
    with_another = stream(room, other_room, headers={"Cookie": ann_cookie}).wait_open()
    others = [
        stream(other_room, headers={"Cookie": ann_cookie}).wait_open(),
        stream(room, headers={"Cookie": bob_cookie}).wait_open(),
        stream(room).wait_open(),
    ]
    leave(ann, room)
    assert_ended(ended, room)
    assert_ended(with_another, room)
    for where in (room, other_room):
        send_event(where, "message", "after")
    for client in others:
        assert client.wait_count(1)[0].data == '"after"'
        assert client.connections == 1


def test_stream_of_as_many_channels_as_there_can_be_ends_at_once_and_more_are_refused(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    ann, cookie = log_in("ann")
    rooms = [f"{channel}{n:02}" for n in range(20)]
    join(ann, *rooms)
    refused = stream(*rooms, headers={"Cookie": cookie})
    assert refused.ended.wait(20)
    [error] = refused.control
    assert json.loads(error.data)["text"] == ("Invalid request: Channel limit exceeded (20 > 19).")
    for revoked in (rooms[0], rooms[18]):
        client = stream(*rooms[:19], headers={"Cookie": cookie}).wait_open()
        for room in rooms[:19]:
            send_event(room, "message", room)
        assert {json.loads(event.data) for event in client.wait_count(19)} == set(rooms[:19])
        leave(ann, revoked)
        for room in rooms:
            send_event(room, "message", "secret")
        assert_ended(client, revoked)
        assert "secret" not in {json.loads(event.data) for event in client.events}
        join(ann, revoked)


def test_second_revocation_within_a_minute_ends_the_stream_too(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    ann, cookie = log_in("ann")
    for _ in range(3):
        join(ann, channel)
        client = stream(channel, headers={"Cookie": cookie}).wait_open()
        leave(ann, channel)
        assert_ended(client, channel)


def test_visitors_who_are_not_logged_in_can_be_revoked(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    ann, cookie = log_in("ann")
    for user in (None, ann):
        join(user, channel)
    anonymous = stream(channel).wait_open()
    client = stream(channel, headers={"Cookie": cookie}).wait_open()
    leave(None, channel)
    assert_ended(anonymous, channel)
    send_event(channel, "message", "for ann")
    client.wait_count(1)


def test_nothing_that_commits_after_the_revocation_reaches_the_user(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    ann, cookie = log_in("ann")
    bob, bob_cookie = log_in("bob")
    join(bob, channel)
    witness = stream(channel, headers={"Cookie": bob_cookie}).wait_open()
    for n in range(10):
        join(ann, channel)
        client = stream(channel, headers={"Cookie": cookie}).wait_open()
        send_event(channel, "message", f"before {n}")
        leave(ann, channel)
        for _ in range(20):
            send_event(channel, "message", f"secret {n}")
        assert_ended(client, channel)
        # Earlier events have arrived, unless the end was faster; later ones have not.
        assert [event.data for event in client.events] in ([], [f'"before {n}"'])
        # Events published by then are old for a stream that is opened later.
        witness.wait_count(21 * (n + 1))


def test_revocation_that_is_rolled_back_does_nothing(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    ann, cookie = log_in("ann")
    join(ann, channel)
    client = stream(channel, headers={"Cookie": cookie}).wait_open()
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        Membership.objects.filter(user_id=ann.pk).delete()
        channel_permission_changed(ann, channel)
        _ = 1 / 0
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0
    send_event(channel, "message", "still here")
    client.wait_count(1)
    assert not client.ended.is_set()


def test_user_who_may_still_read_keeps_the_stream_and_misses_nothing(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    ann, cookie = log_in("ann")
    join(ann, channel)
    client = stream(channel, headers={"Cookie": cookie}).wait_open()
    for n in range(20):
        channel_permission_changed(ann, channel)
        send_event(channel, "message", n)
    assert [event.data for event in client.wait_count(20)] == [str(n) for n in range(20)]
    assert client.connections == 1


def test_revocation_that_is_published_late_does_not_end_what_is_granted_again(
    new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    ann, cookie = log_in("ann")
    join(ann, channel)
    client = stream(channel, headers={"Cookie": cookie}).wait_open()
    leave(ann, channel)
    join(ann, channel)
    new_publisher().lead()
    send_event(channel, "message", "again")
    client.wait_count(1)
    assert not client.ended.is_set()


@pytest.mark.parametrize("manager", ["SlowMembers"], indirect=True)
@pytest.mark.parametrize("by_whom", ["this publisher", "the next one"])
def test_stream_that_was_allowed_before_the_revocation_and_held_after_it_ends_soon(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str, by_whom: str
) -> None:
    """The hint is repeated: the first one can meet a stream that is still being opened."""
    ann, cookie = log_in("ann")
    join(ann, channel)
    # A second after its first stream, the proxy asks the origin for all streams of a channel
    # (Pushpin: src/handler/engine.cpp, SUBSCRIBED_DELAY), which would end this one as well.
    with database.connect() as listener:
        listener.execute(f"LISTEN {SlowMembers.DECIDED}")
        witness = stream(channel, f"public{channel}", headers={"Cookie": cookie}).wait_open()
        # One request when it was opened, and one when the proxy asked again.
        assert len(list(listener.notifies(timeout=20, stop_after=4))) >= 4
    send_event(channel, "message", "seen")
    witness.wait_count(1)
    wait_until(lambda: database.value(_ACKNOWLEDGED, [1]), timeout=10)
    with database.connect() as gate:
        gate.execute("SELECT pg_advisory_lock(%s)", [SlowMembers.GATE])
        client = stream(channel, headers={"Cookie": cookie})
        wait_until(lambda: database.value(_DECIDED), timeout=10)
        leave(ann, channel)
        wait_until(lambda: database.value(_ACKNOWLEDGED, [2]), timeout=10)
        if by_whom == "the next one":
            publisher.kill()
            publisher.lead()
    client.wait_open()
    assert_ended(client, channel)


_DECIDED = """SELECT EXISTS (SELECT FROM pg_stat_activity
               WHERE datname = current_database() AND wait_event = 'advisory')"""
_ACKNOWLEDGED = "SELECT coalesce(min(position), 0) >= %s FROM pg_eventstream_proxy"


@pytest.mark.parametrize("manager", ["ObservedVolatile"], indirect=True)
def test_only_streams_of_the_channel_ask_again_and_not_all_of_the_user(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    """For visitors who are not logged in, that would be all their streams."""
    for changed, other in ((f"a{channel}", f"b{channel}"), (f"volatile{channel}", f"d{channel}")):
        with database.connect() as listener:
            listener.execute(f"LISTEN {ObservedVolatile.ASKED}")
            here, there = stream(changed, f"of {changed}").wait_open(), stream(other).wait_open()
            # When it was opened, and a second later, as the proxy does once per channel.
            with closing(listener.notifies(timeout=20)) as notices:
                asked = (notice for notice in notices if notice.payload == other)
                assert len(list(islice(asked, 2))) == 2
        publisher.kill()
        # A stream that asks gets events that were not published.
        for name in (f"of {changed}", other):
            send_event(name, "message", "asked")
        sequence(database)
        publisher.kill()
        database.execute(
            "UPDATE pg_eventstream_proxy"
            " SET position = (SELECT max(position) FROM pg_eventstream_stream)"
        )
        publisher.lead()
        channel_permission_changed(None, changed)
        here.wait_count(1)
        assert there.events == []


FORGED = [
    *("x", "{}", "[]", "", "9" * 5000, "[" * 100_000, '{"user": 1, "channel": "c"}'),
    *(json.dumps({"user": "%" * 190_000, "channel": "c"}),),
    *(json.dumps({"user": "u", "channel": "%" * 190_000}),),
    *('{"user": ""}', r'{"user": "\ud800", "channel": ""}', '{"user": "", "channel": "\\udcff"}'),
]


def test_forged_change_of_permission_stops_nothing(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(f"public{channel}").wait_open()
    for n, data in enumerate(FORGED, start=1):
        database.execute(
            "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s)",
            [PERMISSION_CHANGES, data],
        )
        database.send(f"public{channel}", f"after {data[:20]}")
        assert client.wait_count(n)[-1].data == f"after {data[:20]}"
        assert publisher.lines_with("not a valid permission change") == n, data[:20]


def test_revocation_counts_at_every_proxy(
    app: Process,
    pushpin: Pushpin,
    app_port: int,
    new_publisher: NewPublisher,
    stream: OpenStream,
    tmp_path: Path,
    channel: str,
) -> None:
    ann, cookie = log_in("ann")
    join(ann, channel)
    with Pushpin(tmp_path / "second", origin=f"127.0.0.1:{app_port}", sig_key=KEY) as second:
        both = " ".join(f"{proxy.control_url}?key={KEY}" for proxy in (pushpin, second))
        new_publisher(PG_EVENTSTREAM_TEST_GRIP_URL=both).lead()
        there = SSEClient(f"{second.url}/events/", [channel], headers={"Cookie": cookie})
        with there:
            here = stream(channel, headers={"Cookie": cookie}).wait_open()
            there.wait_open()
            send_event(channel, "message", 1)
            for client in (here, there):
                client.wait_count(1)
            leave(ann, channel)
            for client in (here, there):
                assert_ended(client, channel)


@pytest.mark.parametrize("manager", ["Tokens"], indirect=True)
def test_stream_of_a_token_continues_behind_the_proxy(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    ann = User.objects.create_user(channel)
    room = f"of {channel}"
    client = stream(room, headers={"Authorization": f"Bearer user-{channel}"}).wait_open()
    large = "x" * 500_000  # too large to be published, so the proxy fetches it
    for n in range(3):
        send_event(room, "message", f"{n}{large}")
        client.wait_count(n + 1)
    assert client.connections == 1
    with transaction.atomic():
        channel_permission_changed(ann, room)
        ann.delete()
    assert_ended(client, room)
