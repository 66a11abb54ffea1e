"""Silent faults are logged: what is wrong and what to do, and not too often."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection, transaction
from django.test import Client, override_settings
from django.test.utils import setup_test_environment, teardown_test_environment

from pg_eventstream import liveness, send_event, send_events, sse
from pg_eventstream.grip import links, next_links
from pg_eventstream.grip import signature as signatures
from pg_eventstream.grip.proxy import Proxy
from pg_eventstream.publisher import daemon as publisher
from pg_eventstream.rarely import Rarely
from pg_eventstream.servers.processes import wait_until
from tests.project import settings
from tests.support.database import Database
from tests.support.environment import KEY
from tests.support.logged import OTHER_KEY, START, Log, look, said
from tests.support.origin import Origin, behind_a_proxy, signature
from tests.support.roles import granted
from tests.support.rounds import sequence
from tests.support.stored import make_older

GRIP = "django_grip.GripMiddleware"


@pytest.fixture(autouse=True)
def afresh(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset the warnings that are logged once."""
    for module in (next_links, signatures, liveness):
        monkeypatch.setattr(module, "_rarely", Rarely())
    monkeypatch.setattr(liveness, "_check_is_due", Rarely())
    monkeypatch.setattr(liveness, "_is_refused", threading.Event())
    with behind_a_proxy:
        yield


ANSWERS: dict[str, dict[str, Any]] = {
    "redirect": {
        "MIDDLEWARE": [*settings.MIDDLEWARE, "tests.project.middleware.only_with_a_cookie"]
    },
    "refusal": {"MIDDLEWARE": ["tests.project.middleware.under_maintenance", *settings.MIDDLEWARE]},
    "TLS": {
        "MIDDLEWARE": ["django.middleware.security.SecurityMiddleware", *settings.MIDDLEWARE],
        "SECURE_SSL_REDIRECT": True,
    },
    "host": {"MIDDLEWARE": [*settings.MIDDLEWARE, "django.middleware.common.CommonMiddleware"]}
    | {"ALLOWED_HOSTS": ["elsewhere.example"]},
    "URLconf": {"ROOT_URLCONF": "tests.project.no_urls"},
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_that_is_not_ours_is_logged_once_and_says_no_token(
    name: str, caplog: Log
) -> None:
    link = Origin().ask("/events/?channel=c").next_link
    with override_settings(**ANSWERS[name]):
        for _ in range(3):
            Client().get(
                link, headers={"Grip-Sig": signature(), "Grip-Last": "events-c; last-id=0"}
            )
    [message] = said(caplog, next_links)
    assert link.rpartition("next-")[2][:20] not in message
    assert ("FORCE_SCRIPT_NAME" in message) == (name == "URLconf")


def _token() -> str:
    return links.sign(links.Session(("c",), "anonymous"))


def test_what_no_proxy_asks_is_not_logged(caplog: Log) -> None:
    link = f"/events/next-{_token()}"
    last = {"Grip-Last": "events-c; last-id=0"}
    asked: list[tuple[str, dict[str, str]]] = [
        (link, {}),
        (link, {"Grip-Sig": signature(OTHER_KEY), **last}),
        ("/events/next-x", {"Grip-Sig": signature()}),
        ("/next/", {"Grip-Sig": signature()}),
        ("/other/", {"Grip-Sig": signature(), "Grip-Last": "another-c; last-id=0"}),
    ]
    with override_settings(**ANSWERS["redirect"]):
        for path, headers in asked:
            Client().get(path, headers=headers)
    # Links of another application with such channels, which has a view for them.
    Client().get("/rooms/a/events/", headers={"Grip-Sig": signature(), **last})
    # Any response of this package counts.
    for path in (link, f"{link}x"):
        assert Client().get(path, headers={"Grip-Sig": signature()}).status_code in (403, 404)
    assert said(caplog, next_links) == []


PROXIES = [{"control_uri": f"http://user:pw@127.0.0.1:{n}", "key": OTHER_KEY} for n in (1, 2)]
GOOD = {"control_uri": "http://127.0.0.1:3", "key": KEY}
UNVERIFIED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "no proxy": ({"GRIP_URL": None}, signature(), ["no proxy is configured", "Set GRIP_URL"]),
    "no middleware": ({"MIDDLEWARE": []}, signature(), [GRIP, "first entry"]),
    "another key": ({}, signature(OTHER_KEY), ["http://127.0.0.1:1", "sig_key in pushpin.conf"]),
    "several proxies": (
        {"GRIP_URL": None, "GRIP_PROXIES": PROXIES},
        signature(),
        ["(http://127.0.0.1:1, http://127.0.0.1:2)", "GRIP_PROXIES"],
    ),
    "expired": ({}, signature(lifetime=-5), ["has expired", "clocks"]),
    "expired, of the second proxy": (
        {"GRIP_URL": None, "GRIP_PROXIES": [*PROXIES, GOOD]},
        signature(lifetime=-5),
        ["http://127.0.0.1:3", "has expired"],
    ),
    "another issuer": (
        {"GRIP_URL": f"http://127.0.0.1:1?key={KEY}&verify-iss=other"},
        signature(),
        ["'other'", "'pushpin'", "sig_iss"],
    ),
    "a verify key": (
        {"GRIP_VERIFY_KEY": OTHER_KEY},
        signature(),
        ["Compare the key in GRIP_URL", "GRIP_VERIFY_KEY"],
    ),
    "no token at all": ({}, "not a token\u00e9", ["forged"]),
}


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
@pytest.mark.parametrize("name", UNVERIFIED)
def test_signature_that_does_not_verify_is_logged_once_with_what_to_compare(
    name: str, caplog: Log
) -> None:
    changes, sent, expected = UNVERIFIED[name]
    token = f"/events/next-{_token()}"
    with override_settings(**changes):
        for path in ("/events/?channel=c", token, "/events/?channel=d"):
            response = Client().get(path, headers={"Grip-Sig": sent})
            assert response.status_code == 501
    [message] = said(caplog, signatures)
    for text in expected:
        assert text in message
    for secret in (KEY, OTHER_KEY, sent, "user:pw"):
        assert secret not in message


def test_request_without_a_signature_is_nothing_to_log(caplog: Log) -> None:
    assert Client().get("/events/?channel=c").status_code == 501
    assert Client().get("/events/?channel=c", headers={"Grip-Feature": "x"}).status_code == 501
    Origin().open("c")
    assert said(caplog, signatures) == []


def test_forged_signatures_do_not_flood_the_log_nor_hide_another_reason(caplog: Log) -> None:
    for n in range(20):
        Client().get("/events/?channel=c", headers={"Grip-Sig": signature(f"{OTHER_KEY}{n}")})
    assert len(said(caplog, signatures)) == 1
    Client().get("/events/?channel=c", headers={"Grip-Sig": signature(lifetime=-1)})
    assert len(said(caplog, signatures)) == 2


def test_what_was_said_is_said_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rarely = Rarely(600)
    assert [rarely("a"), rarely("a"), rarely("b")] == [True, False, True]
    now += 599
    assert not rarely("a")
    now += 1
    assert [rarely("a"), rarely("a")] == [True, False]


# A publisher that does not run


def lead(database: Database, *names: str, silent: float = 0) -> None:
    """Leave the traces of a publisher to these proxies that died some seconds ago."""
    with database.connect() as leader:
        proxies = [Proxy({"control_uri": name}) for name in names]
        publisher.register(leader, "host:1", proxies)
        leader.execute(
            "UPDATE pg_eventstream_publisher SET heartbeat = now() - make_interval(secs => %s)",
            [silent],
        )


def test_publisher_that_died_is_named(database: Database, caplog: Log) -> None:
    lead(database, "http://127.0.0.1:1", silent=20)
    assert look(caplog) == []
    lead(database, "http://127.0.0.1:1", silent=3600)
    [message] = look(caplog)
    assert "host:1 has shown no sign of life for 3600 seconds" in message
    assert START in message


def test_publisher_with_other_proxies_is_noticed(database: Database, caplog: Log) -> None:
    lead(database)
    [message] = look(caplog)
    assert "sends nothing to the proxy http://127.0.0.1:1" in message
    assert "GRIP_URL" in message


def test_proxy_that_takes_nothing_is_noticed_when_something_waits(
    database: Database, caplog: Log
) -> None:
    lead(database, "http://127.0.0.1:1")
    send_events(("c", "message", n) for n in range(3))
    assert look(caplog) == []  # just sent
    sequence(database)
    assert look(caplog) == []  # just sequenced
    make_older(database, 40)
    database.execute("UPDATE pg_eventstream_proxy SET position = 3")
    assert look(caplog) == []  # taken
    database.execute("UPDATE pg_eventstream_proxy SET position = 1")
    [message] = look(caplog)
    assert "for the proxy http://127.0.0.1:1" in message
    assert "publisher host:1" in message


def test_sender_is_told_with_debug_on_and_its_transaction_is_left_alone(
    database: Database, caplog: Log
) -> None:
    send_event("c", "message", 1)
    assert said(caplog, liveness) == []
    with override_settings(DEBUG=True), transaction.atomic():
        send_event("c", "message", 2)
        wait_until(lambda: len(said(caplog, liveness)) == 1, timeout=20)
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_eventstream_event")
            assert cursor.fetchone() == (2,)
        send_events([("c", "message", 3)])
    assert START in said(caplog, liveness)[0]


def comments(body: str) -> list[str]:
    """The comments before the first event, without the padding."""
    before, _, _ = body.partition("event: ")
    return [line[2:] for line in before.split("\n") if line.startswith(": ") and line.strip(": ")]


def test_stream_says_why_nothing_will_arrive_with_debug_on(database: Database, caplog: Log) -> None:
    """Each stream does, and the log once."""
    assert comments(Origin().open("c").body) == []
    with override_settings(DEBUG=True):
        for _ in range(2):
            answer = Origin().open("c")
            [comment] = comments(answer.body)
            assert comment.startswith("No publisher has ever run")
            assert START in comment
            assert list(answer.control) == ["stream-open"]
        assert len(said(caplog, liveness)) == 1
        lead(database, "http://127.0.0.1:1")
        assert comments(Origin().open("c").body) == []
        lead(database, "http://127.0.0.1:1", silent=3600)
        assert "shows no sign of life" in comments(Origin().open("c").body)[0]
    assert comments(Origin().open("c").body) == []


HOSTILE = [
    "x\n\nevent: message\ndata: forged\n\n",
    "x\r\rdata: forged\r\r",
    "x\r\n\r\nid: 1\r\n",
    "\0data: x",
    "%s %(a)s %%",
    "\u2028data: x\x85data: y",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_name_of_a_publisher_cannot_add_events_to_a_stream(database: Database, name: str) -> None:
    lead(database, "http://127.0.0.1:1", silent=3600)
    if "\0" not in name:  # which PostgreSQL does not store
        database.execute("UPDATE pg_eventstream_publisher SET name = %s", [name])
    with override_settings(DEBUG=True):
        answer = Origin().open("c")
    assert comments(answer.body)
    assert [event.type for event in answer.all] == ["stream-open"]
    for line in re.split("\r\n|\r|\n", sse.encode_comment(name)):
        assert not line or line.startswith(": ")


@pytest.mark.parametrize("kind", ["sender", "endpoint"])
def test_role_without_rights_learns_nothing_and_does_not_ask_again(
    kind: str, database: Database, caplog: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = granted(database, kind)
    database.execute(f"REVOKE ALL ON pg_eventstream_publisher, pg_eventstream_proxy FROM {role}")
    monkeypatch.setitem(connection.settings_dict, "USER", role)
    monkeypatch.setattr(liveness, "_check_is_due", Rarely(0))
    looks: list[int] = []
    look_now = liveness._check_state

    def recorded() -> str | None:
        looks.append(len(looks))
        return look_now()

    monkeypatch.setattr(liveness, "_check_state", recorded)
    connection.close()
    refused = 0
    with override_settings(DEBUG=True), transaction.atomic():
        for _ in range(2):
            if kind == "sender":
                send_event("c", "message", 1)
            else:
                Origin().open("c")
            wait_until(liveness._is_refused.is_set, timeout=20)
            refused = refused or len(looks)
    assert len(looks) == refused > 0
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_without_a_proxy_there_is_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process sequences events itself."""
    looks: list[object] = []
    monkeypatch.setattr(liveness, "run_later", looks.append)
    with override_settings(DEBUG=True):
        with override_settings(GRIP_URL=None):
            send_event("c", "message", 1)
        monkeypatch.setattr(liveness, "_check_is_due", Rarely())
        send_event("c", "message", 2)
    assert len(looks) == 1


def test_in_the_tests_of_a_project_there_is_no_check(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another connection would prevent the removal of the test database."""
    looks: list[object] = []
    monkeypatch.setattr(liveness, "run_later", looks.append)
    setup_test_environment()
    try:
        with override_settings(DEBUG=True):
            send_event("c", "message", 1)
            Origin().open("c")
    finally:
        teardown_test_environment()
    assert looks == []
