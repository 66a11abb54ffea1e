"""What the endpoint refuses. Hostile input is refused properly: no 500, no injection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import Client, override_settings

from pg_eventstream import send_events, sse
from pg_eventstream.errors import InvalidRequest
from tests.support.database import Database
from tests.support.origin import Answer, Origin, behind_a_proxy, log_in, signature
from tests.support.rounds import sequence


@pytest.fixture(autouse=True)
def proxied(database: Database) -> Iterator[None]:
    with behind_a_proxy:
        yield


@pytest.fixture
def origin() -> Origin:
    return Origin()


def send(database: Database, channel: str, *data: str) -> None:
    send_events([(channel, "message", text, None, False) for text in data])
    sequence(database)


def error_of(answer: Answer) -> Any:
    """The stream-error that is the whole response. Nothing is held, nothing follows."""
    assert answer.status == 200
    assert answer.response["Content-Type"] == "text/event-stream; charset=utf-8"
    assert not any(name.startswith("Grip-") for name in answer.response.headers)
    assert [(event.type, event.id) for event in answer.all] == [("stream-error", "error")]
    return json.loads(answer.all[0].data)


def test_stream_without_channels_is_a_bad_request(origin: Origin) -> None:
    assert error_of(origin.open())["condition"] == "bad-request"
    assert error_of(origin.open(""))["condition"] == "bad-request"


def test_more_channels_than_the_limit_are_a_bad_request(origin: Origin) -> None:
    with override_settings(EVENTSTREAM_CHANNEL_LIMIT=3):
        assert origin.open("a", "b", "c", "b").held
        error = error_of(origin.open("a", "b", "c", "d"))
    assert error["condition"] == "bad-request"
    assert "4 > 3" in error["text"]
    with override_settings(EVENTSTREAM_CHANNEL_LIMIT=100):  # more than a proxy allows
        assert origin.open(*map(str, range(19))).held
        assert "20 > 19" in error_of(origin.open(*map(str, range(20))))["text"]


def test_malformed_id_is_a_bad_request(origin: Origin) -> None:
    for last_event_id in (
        *("5", "c", "c:", ":5", "c:x", "c:-1", "c:5,", "c:1_0", "c: 5", "c:٣"),
        *("c:" + "9" * 19, "c:" + "9" * 5000),
    ):
        error = error_of(origin.open("c", lastEventId=[last_event_id]))
        assert error["condition"] == "bad-request"
        with pytest.raises(InvalidRequest):
            sse.parse_id(last_event_id)


def test_client_cannot_resume_after_a_stream_error(origin: Origin) -> None:
    for answer in (
        origin.open("c", last_event_id="error"),
        origin.open("c", lastEventId=["c:1", "error"]),
    ):
        # Only a status other than 200 makes an EventSource stop reconnecting.
        assert answer.status == 400
        assert not any(name.startswith("Grip-") for name in answer.response.headers)


@override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.StaffOnly")
def test_forbidden_channels_end_the_stream_and_are_named(origin: Origin) -> None:
    assert error_of(origin.open("open", "staff 1", "staff2")) == {
        "condition": "forbidden",
        "text": "Permission denied to channels: staff 1, staff2",
        "channels": ["staff 1", "staff2"],
    }
    _, cookie = log_in("ann", is_staff=True)
    assert origin.ask("/events/?channel=staff2", {"Cookie": cookie}).held


def test_only_reading_methods_are_allowed(origin: Origin) -> None:
    for method in (origin.post, origin.put, origin.delete, origin.patch):
        response = method("/events/?channel=c", headers={"Grip-Sig": signature()})
        assert response.status_code == 405
        assert "Grip-Hold" not in response


def test_head_is_answered_and_not_held(origin: Origin) -> None:
    for path in ("/events/?channel=c", origin.open("c", last_event_id="c:0").next_link):
        headers = {"Grip-Sig": signature(), "Grip-Last": "events-c; last-id=0"}
        response = origin.head(path, headers=headers)
        assert response.status_code == 200
        assert response["Content-Type"] == "text/event-stream; charset=utf-8"
        assert not any(name.startswith("Grip-") for name in response.headers)


def test_request_that_no_proxy_signed_gets_a_501_that_says_what_to_do(origin: Origin) -> None:
    link = origin.open("c").next_link
    for grip_sig in (
        None,
        "",
        "garbage",
        "ü.\x01.x",
        signature("another key, as long as it has to be"),
        signature(lifetime=-1),
    ):
        headers = {"Grip-Last": "events-c; last-id=0"}
        if grip_sig is not None:
            headers["Grip-Sig"] = grip_sig
        for path in ("/events/?channel=c", link):
            response = Client().get(path, headers=headers)
            assert response.status_code == 501
            assert response["Content-Type"] == "text/plain"
            assert b"GRIP_URL" in response.content
            assert not any(name.startswith("Grip-") for name in response.headers)


def test_grip_last_of_a_client_that_opens_a_stream_is_ignored(
    database: Database, origin: Origin
) -> None:
    send(database, "c", "1", "2")
    answer = origin.ask("/events/?channel=c", {"Grip-Last": "events-c; last-id=0"})
    assert answer.events == []
    assert answer.opened_at == {"c": 2}


def test_impossible_channel_name_is_a_bad_request(origin: Origin) -> None:
    for channel in ("a\r\nX: y", "a\nX: y", "a\0b", "x" * 256, "x" * 3000, ""):
        answer = origin.open("fine", channel)
        assert error_of(answer)["condition"] == "bad-request"
        assert "X" not in answer.response.headers


@override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.LoneSurrogates")
def test_channel_name_that_is_no_text_is_a_bad_request(origin: Origin) -> None:
    assert error_of(origin.open())["condition"] == "bad-request"


def test_hostile_query_is_answered_in_order(origin: Origin) -> None:
    for query in (
        "channel=%ED%A0%80",  # a lone surrogate
        "channel=%FF%FE",
        "channel=a&lastEventId=%ED%A0%80:5",
        "channel=a&lastEventId=a%2500:5",
        "channel=a&lastEventId=%0D%0Aa:5",
        "channel=a&lastEventId=" + "a:5," * 5000 + "a:5",
        "channel=" + "&channel=".join(map(str, range(900))),
        "channel=a&lastEventId=a:" + "9" * 5000,
        "channel=%22%3E%3C%3B%2C%20rel=next",
        "channel=%()s%25(events-a)s%25I",
        "channel=" + "%F0%9F%8E%89" * 255,
    ):
        answer = origin.ask(f"/events/?{query}")
        assert answer.status == 200
        assert ("stream-open" in answer.control) != ("stream-error" in answer.control)
        header = answer.response.headers.get("Grip-Channel", "")
        assert all(c.isalnum() or c in "-_.~/%=;, " for c in header)
        if answer.held:
            assert header.count("prev-id=") == 1
            assert origin.follow(answer).held


def test_grip_last_that_is_malformed_or_lacks_a_channel_is_refused(origin: Origin) -> None:
    link = origin.open("c", "d").next_link
    for grip_last in (
        *("events-c; last-id=-1", "events-c; last-id=x", "events-c", "events-c; last-id="),
        "events-c; last-id=" + "9" * 19,
        *("", "events-c; last-id=0", "events-x; last-id=0", "c; last-id=0, d; last-id=0"),
    ):
        assert origin.ask(link, {"Grip-Last": grip_last}).status == 403
    assert origin.ask(link, {"Grip-Last": "events-d; last-id=0, events-c; last-id=0"}).held


def test_grip_last_of_other_channels_is_ignored(database: Database, origin: Origin) -> None:
    send(database, "c", "1", "2")
    last = "events-d; last-id=0, c; last-id=0, events-c; last-id=1, user-anonymous; last-id=x"
    assert origin.ask(origin.open("c").next_link, {"Grip-Last": last}).data == ["2"]


def test_event_cannot_break_out_of_its_field(database: Database, origin: Origin) -> None:
    text = "x\n\nevent: forged\ndata: 1\r\rid: 2\r\n\r\nretry: 1"
    send(database, "c", text)
    answer = origin.open("c", last_event_id="c:0")
    assert [event.type for event in answer.events] == ["message"]
    assert answer.data == [text.replace("\r\n", "\n").replace("\r", "\n")]
    assert "\r" not in answer.body
