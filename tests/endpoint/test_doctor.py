"""The doctor's stream: its token opens that channel alone, and nothing else opens it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from io import StringIO
from typing import Any
from unittest import mock
from urllib.parse import urlencode

import pytest
from django.core import signing
from django.core.management import call_command
from django.test import override_settings

from pg_eventstream import InvalidEvent, channel_permission_changed, doctor, send, send_event
from pg_eventstream.channels import DOCTOR, is_reliable
from pg_eventstream.grip import links
from tests.project import settings
from tests.support.database import Database
from tests.support.origin import Answer, Origin, behind_a_proxy
from tests.support.rounds import sequence
from tests.support.stored import age

DRF: dict[str, Any] = {
    "ROOT_URLCONF": "tests.project.drf_urls",
    "INSTALLED_APPS": [
        *settings.INSTALLED_APPS, "django.contrib.staticfiles", "rest_framework",
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def proxied(database: Database) -> Iterator[None]:
    with behind_a_proxy:
        yield


def probe(data: str = "probe") -> None:
    send.insert((DOCTOR, "probe", data, [], None), None)


def open_with(token: str, path: str = "/events/", last_event_id: str = "", **query: str) -> Answer:
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    pairs = urlencode({**query, doctor.PARAMETER: token})
    return Origin().ask(f"{path}?{pairs}", headers)


def channels_of(answer: Answer) -> list[str]:
    parts = answer.response["Grip-Channel"].split(", ")
    return [part.partition(";")[0] for part in parts]


DOCTORS = ["user-anonymous", "events-pg_eventstream%3Adoctor"]


# What opens it


@pytest.mark.parametrize(
    ("path", "configured"),
    [
        ("/events/", {}),
        ("/events/?channel=a", {}),
        ("/rooms/x/", {"ROOT_URLCONF": "tests.project.url_forms"}),
        ("/fixed/", {"ROOT_URLCONF": "tests.project.url_forms"}),
        ("/events/", {"EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channelmanagers.Members"}),
        ("/events/", {"EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channelmanagers.Racing"}),
        ("/view/any/", DRF),
    ],
)
def test_token_opens_the_channel_of_the_doctor_and_no_other(
    path: str, configured: dict[str, Any]
) -> None:
    with (
        override_settings(**configured),
        mock.patch("tests.project.channelmanagers.Racing.allowed", False),
    ):
        joint = "&" if "?" in path else "?"
        answer = Origin().ask(f"{path}{joint}{doctor.PARAMETER}={doctor.make_token()}")
        assert answer.held
        assert channels_of(answer) == DOCTORS
        assert list(answer.opened_at) == [DOCTOR]
        following = Origin().follow(answer)
        assert following.held
        assert channels_of(following) == DOCTORS


def test_doctor_resumes_and_its_stream_continues_without_any_permission(
    database: Database,
) -> None:
    with override_settings(
        EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Members"
    ):
        opened = open_with(doctor.make_token())
        probe()
        channel_permission_changed(None, DOCTOR)
        sequence(database)
        again = open_with(doctor.make_token(), last_event_id=opened.control["stream-open"].id)
        assert [event.data for event in again.events if event.type == "probe"] == ["probe"]
        following = Origin().follow(opened)
        assert following.data == ["probe"]
        assert following.body.startswith(doctor.CONTINUED)


def test_proxy_is_to_ask_soon_how_the_stream_continues_and_later_as_usual() -> None:
    opened = open_with(doctor.make_token())
    assert opened.response["Grip-Link"].endswith("timeout=1")
    assert Origin().follow(opened).response["Grip-Link"].endswith("timeout=600")


def test_endpoint_describes_itself_to_the_doctor_alone() -> None:
    opened = open_with(doctor.make_token())
    told = json.loads(opened.all[0].data)
    assert opened.all[0].type == doctor.DESCRIPTION
    assert told["proxied"] is True
    assert told["next_link"] == opened.next_link
    assert told["table"] == doctor.identify_table()
    assert told["unverified"] is None
    assert abs(told["time"] - time.time()) < 60
    assert not any(event.type == doctor.DESCRIPTION for event in Origin().open("c").all)


def test_doctor_is_told_why_a_signature_does_not_count() -> None:
    path = f"/events/?{doctor.PARAMETER}={doctor.make_token()}"
    answer = Origin().ask(path, {"Grip-Sig": "forged"})
    assert answer.status == 501
    told = json.loads(answer.body)
    assert told["unverified"][0] == "wrong-key"
    assert "table" not in json.dumps(Origin().ask("/events/?channel=c", {"Grip-Sig": "x"}).body)


# What does not open it


@pytest.mark.parametrize(
    ("path", "configured"),
    [
        (f"/events/?channel={DOCTOR}", {}),
        (f"/events/?channel=a&channel={DOCTOR}", {}),
        (f"/channel/{DOCTOR}/", {"ROOT_URLCONF": "tests.project.url_forms"}),
        (f"/rooms/{DOCTOR}/", {"ROOT_URLCONF": "tests.project.url_forms"}),
        (f"/objects/{DOCTOR}/7/", {"ROOT_URLCONF": "tests.project.url_forms"}),
        (f"/rooms/{DOCTOR}/events/", {}),
        (f"/view/any/?channels={DOCTOR}", DRF),
        (f"/view/any/?channel={DOCTOR}", DRF),
        (f"/events/{DOCTOR}/", DRF),
        (f"/events/?channels={DOCTOR}", DRF),
        (
            "/events/",
            {
                "EVENTSTREAM_CHANNELMANAGER_CLASS": (
                    "tests.project.channelmanagers.NamesReservedChannels"
                )
            },
        ),
    ],
)
def test_nothing_else_opens_the_channel_of_the_doctor(
    database: Database, path: str, configured: dict[str, Any]
) -> None:
    probe("secret")
    sequence(database)
    with override_settings(**configured):
        for start in ({}, {"Last-Event-ID": "earliest"}):
            answer = Origin().ask(path, start)
            assert "secret" not in answer.body
            assert "Grip-Hold" not in answer.response.headers
            if answer.status == 200:
                assert "reserved" in answer.control["stream-error"].data


def stamped(content: str, salt: str, age: float = 0) -> str:
    with mock.patch("time.time", return_value=time.time() - age):
        return signing.TimestampSigner(salt=salt).sign(content)


TOKENS: dict[str, tuple[Callable[[], str], str]] = {
    "empty": (lambda: "", "key"),
    "any text": (lambda: "5", "key"),
    "not signed": (lambda: "open:1abcde:x", "key"),
    "another purpose": (lambda: stamped("open", "pg_eventstream.next-link"), "key"),
    "no purpose": (lambda: stamped("open", "django.core.signing"), "key"),
    "another content": (lambda: stamped("other", "pg_eventstream.doctor"), "key"),
    "a next link": (lambda: links.sign(links.Session((DOCTOR,), "anonymous")), "key"),
    "without a time": (lambda: signing.Signer(salt="pg_eventstream.doctor").sign("open"), "key"),
    "expired": (lambda: stamped("open", "pg_eventstream.doctor", 360), "clock"),
    "of the future": (lambda: stamped("open", "pg_eventstream.doctor", -120), "clock"),
}


@pytest.mark.parametrize("which", TOKENS)
def test_invalid_token_opens_nothing_and_is_not_logged(
    database: Database, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = TOKENS[which]
    token = make()
    probe("secret")
    sequence(database)
    caplog.set_level(logging.DEBUG)
    answer = open_with(token, last_event_id="earliest", channel="a")
    assert not answer.held
    error = json.loads(answer.control["stream-error"].data)
    assert (error["condition"], error["doctor"]) == ("bad-request", reason)
    assert "secret" not in answer.body
    assert len(token) < 5 or token not in caplog.text


def test_valid_token_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = doctor.make_token()
    assert open_with(token).held
    assert Origin().ask(f"/events/?{doctor.PARAMETER}={token}", {"Grip-Sig": "x"}).status == 501
    assert token not in caplog.text


def test_token_expires_after_five_minutes() -> None:
    token = doctor.make_token()
    for seconds, valid in ((0, True), (299, True), (302, False), (-30, True), (-62, False)):
        now = time.time() + seconds
        with mock.patch("pg_eventstream.doctor.time.time", return_value=now):
            assert doctor.is_valid(token) == valid, seconds


def test_link_of_the_doctor_continues_its_stream_only_for_the_proxy() -> None:
    opened = open_with(doctor.make_token())
    assert Origin().ask(opened.next_link).status == 403  # without Grip-Last


# The channel


def test_users_cannot_send_to_the_doctor() -> None:
    with pytest.raises(InvalidEvent, match="reserved"):
        send_event(DOCTOR, "probe", "x")


def test_probes_have_ids_and_are_pruned_after_a_minute(database: Database) -> None:
    assert is_reliable(DOCTOR)
    probe()
    send_event("a", "message", 1)
    sequence(database)
    call_command("eventstream_prune", stdout=StringIO())
    age(database, events_of=DOCTOR, by=timedelta(seconds=61))
    age(database, events_of="a", by=timedelta(seconds=61))
    call_command("eventstream_prune", stdout=StringIO())
    assert database.fetch("SELECT channel FROM pg_eventstream_stream") == [("a",)]
    probe()
    sequence(database)
    eid = "SELECT eid FROM pg_eventstream_stream WHERE channel = %s"
    assert database.value(eid, [DOCTOR]) == 2
