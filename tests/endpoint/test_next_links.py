"""Next links, by which a stream continues: what they allow, and to whom."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from django.contrib.auth.models import User
from django.core import signing
from django.http import HttpResponse
from django.test import RequestFactory, override_settings
from django_grip import GripMiddleware

from pg_eventstream import send_events, views
from pg_eventstream.grip import items, links
from pg_eventstream.stream_event import StreamEvent
from tests.support.database import Database
from tests.support.origin import Answer, Origin, behind_a_proxy, log_in, signature
from tests.support.rounds import sequence


@pytest.fixture(autouse=True)
def proxied(database: Database) -> Iterator[None]:
    with behind_a_proxy:
        yield


staff_only = override_settings(
    EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.StaffOnly"
)


@pytest.fixture
def origin() -> Origin:
    return Origin()


def opened(origin: Origin, *channels: str, cookie: str = "") -> Answer:
    query = "&".join(f"channel={channel}" for channel in channels)
    return origin.ask(f"/events/?{query}", {"Cookie": cookie} if cookie else {})


def is_refused(origin: Origin, link: str) -> bool:
    answer = origin.ask(link, {"Grip-Last": "events-c; last-id=0"})
    assert answer.status in (200, 403)
    assert (answer.status == 200) == answer.held
    return answer.status == 403


# The content of a link


def test_equal_sessions_get_equal_links_so_that_the_proxy_fetches_them_once(
    origin: Origin,
) -> None:
    _, ann = log_in("ann")
    assert opened(origin, "a", "b").next_link == opened(origin, "b", "a", "b").next_link
    first, second = (opened(origin, *order, cookie=ann) for order in ("ab", "ba"))
    assert first.next_link == second.next_link == origin.follow(first).next_link


def test_different_sessions_never_share_a_link(origin: Origin) -> None:
    _, ann = log_in("ann")
    _, bob = log_in("bob")
    links = [
        opened(origin, *channels, cookie=cookie).next_link
        for cookie in ("", ann, bob)
        for channels in (["a"], ["b"], ["a", "b"], ["a,b"])
    ]
    # The differences are in the path, because the proxy ignores the query when it shares.
    assert len({link.partition("?")[0] for link in links}) == 12


def test_link_stays_the_same_for_an_hour_and_works_for_a_day(origin: Origin) -> None:
    hour = time.time() // 3600 * 3600
    with mock.patch("pg_eventstream.grip.links.time") as clock:
        clock.time.return_value = hour
        link = opened(origin, "c").next_link
        clock.time.return_value = hour + 3599
        assert opened(origin, "c").next_link == link
        clock.time.return_value = hour + 3600
        assert opened(origin, "c").next_link != link
        for age, refused in ((0, False), (24 * 3600, False), (25 * 3600, True), (10**9, True)):
            clock.time.return_value = hour + age
            assert is_refused(origin, link) == refused


def test_tampered_and_foreign_links_are_refused(origin: Origin) -> None:
    link = opened(origin, "c").next_link
    base, _, token = link.partition(links.NEXT)
    value, _, seal = token.rpartition(":")
    assert not is_refused(origin, link)
    for n in range(len(token)):
        other = "A" if token[n] != "A" else "B"
        assert is_refused(origin, f"{base}{links.NEXT}{token[:n]}{other}{token[n + 1 :]}")
    for n in range(1, len(token)):
        assert is_refused(origin, f"{base}{links.NEXT}{token[:n]}")
    for wrong in (f"{value}:", f":{seal}", "x", "%00", "%ED%A0%80", "%F0%9F%8E%89", f".{token}"):
        assert is_refused(origin, f"{base}{links.NEXT}{wrong}")

    session = links.Session(("c",), "anonymous")
    with override_settings(SECRET_KEY="another key, just as long as the right one"):
        foreign = links.sign(session)
    assert is_refused(origin, f"{base}{links.NEXT}{foreign}")
    with override_settings(SECRET_KEY_FALLBACKS=["another key, just as long as the right one"]):
        assert not is_refused(origin, f"{base}{links.NEXT}{foreign}")
    content = {"c": ["c"], "u": None, "x": 10**9}
    for salt in ("django.core.signing.Signer", "django.contrib.sessions", ""):
        other_token = signing.Signer(salt=salt).sign_object(content, compress=True)
        assert is_refused(origin, f"{base}{links.NEXT}{other_token}")
        assert is_refused(origin, f"{base}{links.NEXT}{signing.dumps(content, salt=salt)}")


def test_link_tells_no_more_than_the_proxy_signed_for(origin: Origin) -> None:
    link = opened(origin, "c").next_link
    answer = origin.ask(f"{link}?channel=other", {"Grip-Last": "events-c; last-id=0"})
    assert "events-other" not in answer.response["Grip-Channel"]
    assert "next-" in answer.next_link
    assert "?" not in answer.next_link


def test_last_id_of_another_channel_does_not_stand_in_for_one_that_is_missing(
    origin: Origin,
) -> None:
    link = opened(origin, "c").next_link
    assert origin.ask(link, {"Grip-Last": "events-d; last-id=0"}).status == 403
    assert origin.ask(link, {"Grip-Last": "events-c; last-id=0, events-d; last-id=0"}).held


def test_held_stream_continues_from_what_the_proxy_sent_and_not_from_where_it_opened(
    database: Database, origin: Origin
) -> None:
    link = opened(origin, "c").next_link
    send_events([("c", "message", n) for n in range(2)])
    sequence(database)
    assert origin.ask(link, {"Grip-Last": "events-c; last-id=1"}).data == ["1"]


# The user of a stream


def test_stream_of_a_user_who_is_gone_ends(origin: Origin) -> None:
    for name, end in (
        ("deleted", lambda user: user.delete()),
        ("inactive", lambda user: User.objects.filter(pk=user.pk).update(is_active=False)),
    ):
        user, cookie = log_in(name)
        stream = opened(origin, "c", cookie=cookie)
        assert origin.follow(stream).held
        end(user)
        answer = origin.follow(stream)
        assert json.loads(answer.control["stream-error"].data)["channels"] == ["c"]
        assert not answer.held
        assert "Grip-Link" not in answer.response


@staff_only
def test_stream_ends_when_the_permission_for_one_of_its_channels_does(origin: Origin) -> None:
    user, cookie = log_in("ann", is_staff=True)
    stream = opened(origin, "open", "staff%2525", cookie=cookie)
    assert origin.follow(stream).held
    User.objects.filter(pk=user.pk).update(is_staff=False)
    answer = origin.follow(stream)
    error = answer.control["stream-error"]
    assert error.id == "error"
    assert json.loads(error.data) == {
        "condition": "forbidden",
        "text": "Permission denied to channels: staff%25",
        "channels": ["staff%25"],
    }
    assert not answer.held
    assert "Grip-Link" not in answer.response


def test_visitors_who_are_not_logged_in_can_be_skipped_as_anonymous(
    database: Database, origin: Origin
) -> None:
    _, cookie = log_in("ann")
    send_events([("c", "message", "x", ["anonymous"], False)])
    sequence(database)
    assert origin.open("c", last_event_id="c:0").events == []
    answer = origin.ask("/events/?channel=c&lastEventId=c:0", {"Cookie": cookie})
    assert answer.data == ["x"]


def test_user_ids_with_commas_quotes_or_line_breaks_are_skipped_too(database: Database) -> None:
    class Visitor:
        is_authenticated = True
        pk = 'a,b "c"\r\nX: y; é'

    def view(request: Any) -> Any:
        request.user = Visitor()
        return views.events(request)

    request = RequestFactory().get("/events/?channel=c", headers={"Grip-Sig": signature()})
    response = GripMiddleware(view)(request)
    assert isinstance(response, HttpResponse)
    assert "X" not in response.headers
    meta = response["Grip-Set-Meta"].partition('user="')[2].partition('"')[0]
    event = StreamEvent(1, "c", 1, 0, "message", "x", ["b", Visitor.pk, "7", ""])
    skipped = json.loads(items.item(event))["meta"]["skip_users"]
    assert [part for part in skipped.split(",") if part] == ["b", meta, "7"]
