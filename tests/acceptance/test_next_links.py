"""Next links, as the proxy follows them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from django.contrib.auth.models import User

from pg_eventstream import send_events
from tests.support.database import Database
from tests.support.origin import behind_a_proxy, log_in
from tests.support.publisher import PublisherProcess
from tests.support.sse_client import OpenStream


@pytest.fixture(autouse=True)
def proxied(database: Database) -> Iterator[None]:
    with behind_a_proxy:
        yield


@pytest.fixture
def server_settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_EVENTSTREAM_TEST_SETTINGS", json.dumps(request.param))


# Request the next link after a second, and let staff read more than others.
asks_at_once = pytest.mark.parametrize(
    "server_settings",
    [
        {
            "EVENTSTREAM_NEXT_LINK_TIMEOUT": 1,
            "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channelmanagers.StaffOnly",
        }
    ],
    indirect=True,
)


@asks_at_once
def test_open_stream_ends_with_an_error_soon_after_the_permission_does(
    server_settings: None, stream: OpenStream, channel: str
) -> None:
    staff = f"staff{channel} 100%"
    user, cookie = log_in("ann", is_staff=True)
    other, other_cookie = log_in("bob", is_staff=True)
    client = stream(staff, channel, headers={"Cookie": cookie}).wait_open()
    second = stream(staff, headers={"Cookie": other_cookie}).wait_open()
    bystander = stream(channel).wait_open()
    User.objects.filter(pk=user.pk).update(is_staff=False)
    other.delete()
    for ended in (client, second):
        assert ended.ended.wait(20)
        error = ended.control[-1]
        assert (error.type, error.id) == ("stream-error", "error")
        assert json.loads(error.data)["channels"] == [staff]
    assert not bystander.ended.is_set()


def test_users_on_one_path_get_their_own_events_when_both_are_fetched_at_once(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    ann, ann_cookie = log_in("ann")
    bob, bob_cookie = log_in("bob")
    clients = {
        ann.pk: stream(channel, headers={"Cookie": ann_cookie}).wait_open(),
        bob.pk: stream(channel, headers={"Cookie": bob_cookie}).wait_open(),
        "anonymous": stream(channel).wait_open(),
    }
    padding = "x" * 500_000  # too large to be published, so all of them fetch it
    sent = []
    for n in range(3):
        for skip in clients:
            sent.append((f"{n} not for {skip}" + padding, skip))
            send_events([(channel, "message", sent[-1][0], [skip], False)])
        sent.append((f"{n} for all", None))
        send_events([(channel, "message", sent[-1][0], None, False)])
        for who, client in clients.items():
            expected = [text for text, skip in sent if skip != who]
            got = [event.data for event in client.wait_count(len(expected))]
            assert [text[:30] for text in got] == [text[:30] for text in expected]


# skip_user_ids


def test_skipped_user_gets_the_event_neither_live_nor_replayed_and_the_ids_advance(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    ann, cookie = log_in("ann")
    headers = {"Cookie": cookie}
    quiet = f"{channel}quiet"

    def send(text: str, *skipped: object) -> None:
        send_events([(channel, "message", text, skipped, False)])

    live, others = stream(channel, headers=headers).wait_open(), stream(channel).wait_open()
    several = stream(channel, quiet, headers=headers).wait_open()
    send("1")
    send("2 without ann", ann.pk)
    send("3 without others", ann.pk + 1, "x")
    send("4 without ann", "x", ann.pk)
    send("5")
    send("6 without ann", ann.pk)
    others.wait_count(6)
    expected = [("1", 1), ("3 without others", 3), ("5", 5)]
    for client in (live, several):
        client.wait_count(3)
        assert [(event.data, event.eids[channel]) for event in client.events] == expected

    # Events after the last one that ann saw are filtered again when she reconnects.
    live.close()
    again = stream(channel, headers=headers, last_event_id=live.last_event_id).wait_open()
    replayed = stream(channel, headers=headers, last_event_id=f"{channel}:0").wait_open()
    send("7 without ann", ann.pk)
    send("8")
    assert [event.data for event in again.wait_count(1)] == ["8"]
    replayed.wait_count(4)
    assert [(event.data, event.eids[channel]) for event in replayed.events] == [*expected, ("8", 8)]
    assert len(others.wait_count(8)) == 8
