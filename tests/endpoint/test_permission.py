"""Who may read, and what happens to open streams when that changes."""

from __future__ import annotations

import json

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.test import override_settings

from pg_eventstream import (
    InvalidEvent,
    channel_permission_changed,
    get_events,
    send_event,
)
from pg_eventstream.channels import PERMISSION_CHANGES
from tests.project.channelmanagers import Racing
from tests.support.database import Database
from tests.support.origin import Origin, behind_a_proxy
from tests.support.rounds import sequence


@pytest.fixture(autouse=True, params=["Members"])
def manager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the channel manager of the test's servers; parametrize indirectly with another."""
    settings = {
        "EVENTSTREAM_CHANNELMANAGER_CLASS": f"tests.project.channelmanagers.{request.param}",
        "EVENTSTREAM_CHANNEL_LIMIT": 19,
    }
    monkeypatch.setenv("PG_EVENTSTREAM_TEST_SETTINGS", json.dumps(settings))


@behind_a_proxy
def test_channel_by_which_a_user_is_told_is_the_last_that_a_proxy_would_cut_off(
    database: Database,
) -> None:
    opened = Origin().open("public-a", "public-b")
    names = [part.partition(";")[0] for part in opened.response["Grip-Channel"].split(", ")]
    assert names == ["user-anonymous", "events-public-a", "events-public-b"]


@behind_a_proxy
@override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Racing")
@pytest.mark.parametrize("how", ["open", "go on", "get_events"])
def test_nothing_is_read_before_permission_is_asked_for(
    database: Database, channel: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    origin = Origin()
    monkeypatch.setattr(Racing, "allowed", True)
    first = origin.open(channel)

    def revoke() -> None:
        Racing.allowed = False
        channel_permission_changed(None, channel)
        send_event(channel, "message", "secret")
        sequence(database)

    Racing.meanwhile.append(revoke)
    if how == "open":
        answer = origin.open(channel, last_event_id="earliest").body
    elif how == "go on":
        answer = origin.follow(first).body
    else:
        answer = str(get_events([channel], "earliest", user=None))
    assert not Racing.allowed
    assert "secret" not in answer


def test_user_without_a_primary_key_is_no_one_whose_streams_could_end(database: Database) -> None:
    ann = User.objects.create_user("ann")
    ann.delete()
    with pytest.raises(InvalidEvent, match="before it is deleted"):
        channel_permission_changed(ann, "c")
    for name in ("", "a\nb", "x" * 300, 5):
        with pytest.raises(InvalidEvent, match="channel"):
            channel_permission_changed(None, name)  # type: ignore[arg-type]
    channel_permission_changed(AnonymousUser(), "c")
    assert database.fetch("SELECT data FROM pg_eventstream_event") == [
        ('{"user": "anonymous", "channel": "c"}',)
    ]


# Reserved channels


@behind_a_proxy
def test_no_client_reads_or_sends_on_a_reserved_channel(database: Database) -> None:
    channel_permission_changed(None, "secret room")
    sequence(database)
    answer = Origin().open(PERMISSION_CHANGES, last_event_id="earliest")
    assert json.loads(answer.control["stream-error"].data)["condition"] == "bad-request"
    assert "secret" not in answer.body
    with pytest.raises(InvalidEvent, match="reserved"):
        send_event(PERMISSION_CHANGES, "message", "x")


# The user


@behind_a_proxy
@override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Tokens")
def test_manager_sees_the_request_and_says_who_the_user_is(database: Database) -> None:
    User.objects.create_user("ann")
    origin = Origin()
    ask = {"Authorization": "Bearer user-ann"}
    stream = origin.ask("/events/?channel=of%20ann", ask)
    assert stream.held
    # The proxy's own requests have no token and continue as the same user.
    assert origin.follow(stream).held
    assert origin.ask("/events/?channel=of%20bob", ask).control["stream-error"]
    assert origin.open("of ann").control["stream-error"]
    assert origin.ask("/events/?channel=of%20ann", {"Authorization": "Basic x"}).status == 403
