"""Where no command runs the checks: errors are logged, and raised where a setting is used."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.db import ProgrammingError, connections
from django.http import HttpRequest, HttpResponseBase
from django.test import AsyncClient, Client, override_settings
from django.urls import include, path

from pg_eventstream import endpoint, send_event, send_events, subscribe, views
from pg_eventstream.checks import first_use, proxies
from pg_eventstream.checks import settings as checks
from pg_eventstream.rarely import Rarely
from tests.project.settings import INSTALLED_APPS, MIDDLEWARE
from tests.support.database import Database
from tests.support.origin import Origin, behind_a_proxy

Log = pytest.LogCaptureFixture
SECRET = "a secret of thirty-two characters"
PROXY = {"control_uri": "http://localhost:5561", "key": SECRET.encode()}
FASTLY = "https://api.fastly.com/service/ID?key=token&verify-iss=fastly:ID"
TLS = {
    "SECURE_SSL_REDIRECT": True,
    "MIDDLEWARE": [
        "django_grip.GripMiddleware",
        "django.middleware.security.SecurityMiddleware",
    ],
}
HERE = "tests.endpoint.test_without_checks"


class NoManager:
    pass


class DeniesAll:
    def allow_migrate(self, *arguments: Any, **hints: Any) -> bool:
        return False


#: What each check finds, and which of streams, senders and publishers refuse to work with it.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "E001": ({"EVENTSTREAM_DATABASE": "elsewhere"}, "streams senders publisher"),
    "E002": ({"EVENTSTREAM_DATABASE": "lite"}, "streams senders publisher"),
    "E003": ({"EVENTSTREAM_RETENTION": 0}, "streams publisher"),
    "E004": ({"EVENTSTREAM_CHANNEL_LIMIT": 0}, "streams publisher"),
    "E005": ({"EVENTSTREAM_NEXT_LINK_TIMEOUT": None}, "streams publisher"),
    "E006": ({"EVENTSTREAM_SAFETY_POLL": 0}, "streams publisher"),
    "E007": ({"EVENTSTREAM_CHANNELMANAGER_CLASS": f"{HERE}.NoManager"}, "streams publisher"),
    "E008": ({"GRIP_PROXIES": [{**PROXY, "control_uri": "tcp://localhost:5560"}]}, "publisher"),
    "E009": ({"GRIP_PROXIES": [PROXY], "MIDDLEWARE": []}, ""),
    "E010": ({"GRIP_URL": f"http://localhost:5562?key={SECRET}", "GRIP_PROXIES": [PROXY]}, ""),
    "E011": ({"GRIP_VERIFY_KEY": SECRET, "GRIP_URL": "http://localhost:5561"}, ""),
    "E012": ({"GRIP_PROXIES": [{**PROXY, "key": "base64:c2VjcmV0"}]}, ""),
    "E013": ({"GRIP_URL": FASTLY}, ""),
    "E014": ({"EVENTSTREAM_ALLOW_ORIGIN": 5}, "streams"),
    "E015": ({"EVENTSTREAM_ALLOW_ORIGIN": "*", "EVENTSTREAM_ALLOW_CREDENTIALS": True}, ""),
    "E016": ({"EVENTSTREAM_ALLOW_HEADERS": "X-A: 1"}, ""),
    "E017": ({"EVENTSTREAM_MAX_AGE": 0}, "streams publisher"),
    "E018": ({"EVENTSTREAM_REPLAY_AGE": 0}, "streams publisher"),
    "E019": ({"DATABASE_ROUTERS": [f"{HERE}.DeniesAll"]}, ""),
    "E022": ({"EVENTSTREAM_METRICS_TOKEN": "short"}, ""),
    "E023": ({"EVENTSTREAM_CONSUMER_HOLD": None}, "streams publisher"),
    "W001": ({"GRIP_URL": "http://localhost:5561"}, ""),
    "W002": ({"EVENTSTREAM_REDIS": {"host": "localhost"}}, ""),
    "W003": ({"GRIP_URL": "http://localhost:5561?key=changeme"}, ""),
    "W004": ({**TLS, "GRIP_PROXIES": [PROXY]}, ""),
    "W005": ({"EVENTSTREAM_RETENTION": 599, "GRIP_PROXIES": [PROXY]}, ""),
    "W006": ({"DEBUG": True}, ""),
    "W007": ({}, ""),
}


@pytest.fixture(autouse=True)
def first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "_is_due", Rarely(float("inf")))


@pytest.fixture
def lite(database: Database, tmp_path: Path) -> Iterator[None]:
    """A database that is not PostgreSQL, in addition to the one that is."""
    connections.settings["lite"] = connections.configure_settings(
        {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "lite")}}
    )["default"]
    yield
    connections["lite"].close()
    del connections["lite"]
    del connections.settings["lite"]


@pytest.mark.parametrize("number", WRONG)
def test_first_request_logs_what_the_checks_would_have_said(
    number: str, lite: None, caplog: Log
) -> None:
    settings, _ = WRONG[number]
    with override_settings(**settings):
        expected = {message.id: message for message in checks.check_settings()}
        for _ in range(2):
            Client(raise_request_exception=False).get("/nothing/")
    logged = [r.getMessage() for r in caplog.records if r.name == first_use.logger.name]
    assert len(logged) == len(expected)  # once
    message = expected[f"pg_eventstream.{number}"]
    assert f"{message.msg} {message.hint} (pg_eventstream.{number})" in logged


def test_every_check_of_the_settings_is_in_the_table() -> None:
    source = inspect.getsource(checks) + inspect.getsource(proxies)
    ids = set(re.findall(r"pg_eventstream\.([EW]\d{3})", source))
    assert ids == {*WRONG, "W008"}  # of another app, whose checks would remain registered here


async def directly() -> None:
    response: Any = await AsyncClient().get("/events/?channel=a")
    await response.streaming_content.__aiter__().__anext__()


async def follow() -> None:
    subscription = subscribe(["a"], "earliest")
    await asyncio.wait_for(anext(subscription), 1)


@pytest.mark.parametrize("number", [n for n in WRONG if WRONG[n][1]])
def test_what_cannot_work_is_refused_at_once_with_the_setting(number: str, lite: None) -> None:
    settings, refused = WRONG[number]
    name = next(iter(settings))
    with override_settings(**settings):
        if "streams" in refused:
            with behind_a_proxy, pytest.raises(ImproperlyConfigured, match=name):
                Origin().open("a")
            with pytest.raises(ImproperlyConfigured, match=name):
                asyncio.run(directly())
            if number != "E014":
                with pytest.raises(ImproperlyConfigured, match=name):
                    asyncio.run(follow())
        if "senders" in refused:
            with pytest.raises(ImproperlyConfigured, match=name):
                send_event("a", "message", {})
            with pytest.raises(ImproperlyConfigured, match=name):
                send_events([("a", "message", {})])
        if "publisher" in refused:
            with pytest.raises(CommandError, match=f"{name}|'elsewhere'"):
                call_command("eventstream_publisher", once=True, verbosity=0, stdout=StringIO())


@pytest.mark.parametrize("installed", [True, False])
def test_sender_without_tables_is_told_what_to_do(database: Database, installed: bool) -> None:
    database.execute("ALTER TABLE pg_eventstream_event RENAME TO elsewhere")
    apps = [app for app in INSTALLED_APPS if installed or "pg" not in app]
    with override_settings(INSTALLED_APPS=apps):
        with pytest.raises(ProgrammingError, match=r"manage\.py migrate") as refused:
            send_event("a", "message", {})
        assert ("INSTALLED_APPS" in str(refused.value)) is not installed
        with pytest.raises(ProgrammingError, match=r"manage\.py migrate"):
            send_events([("a", "message", {})])


def test_endpoint_of_an_app_that_is_not_installed_says_so(database: Database) -> None:
    apps = [app for app in INSTALLED_APPS if "pg" not in app]
    with (
        override_settings(INSTALLED_APPS=apps),
        pytest.raises(ImproperlyConfigured, match='"pg_eventstream" to INSTALLED_APPS'),
    ):
        Client().get("/events/?channel=a")


@pytest.mark.parametrize(
    ("settings", "says", "logged"),
    [
        ({}, "pip install daphne", True),
        ({"GRIP_PROXY_REQUIRED": True}, "GRIP_PROXY_REQUIRED demands", True),
        ({"GRIP_PROXIES": [PROXY]}, "django_grip.GripMiddleware", False),
        ({"GRIP_PROXIES": [PROXY], "GRIP_PROXY_REQUIRED": True}, "GRIP_PROXY_REQUIRED", False),
    ],
)
def test_answer_501_says_why_and_so_does_the_log_where_no_stream_can_come(
    database: Database,
    caplog: Log,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    says: str,
    logged: bool,
) -> None:
    monkeypatch.setattr(endpoint, "_rarely", Rarely())
    middleware = [] if "GRIP_PROXY_REQUIRED" in settings else MIDDLEWARE
    with override_settings(MIDDLEWARE=middleware, **settings):
        for _ in range(2):
            response = Client().get("/events/?channel=a")
            assert response.status_code == 501
            assert says in response.content.decode()
    lines = [r.getMessage() for r in caplog.records if r.name == endpoint.logger.name]
    assert len(lines) == logged
    assert all(says in line for line in lines)


# Views of a project


def own(request: HttpRequest, **kwargs: Any) -> HttpResponseBase:
    return views.events(request, channels=["a"])


class Urls:
    """A URLconf."""

    def __init__(self, *patterns: Any) -> None:
        self.urlpatterns = [path("own/", own), *patterns]


OURS = "pg_eventstream.urls"
IN_A_NAMESPACE = path("es/", include((OURS, "es")))
MOUNTED: dict[str, list[Any]] = {
    "plain": [path("events/", include(OURS))],
    "namespace": [IN_A_NAMESPACE],
    "instance": [path("es/", include((OURS, "es"), namespace="other"))],
    "nested": [path("api/", include([path("v1/", include(OURS))]))],
    "nested namespaces": [path("api/", include(([IN_A_NAMESPACE], "api")))],
    "beside one with a parameter": [path("<room>/x/", include(OURS)), IN_A_NAMESPACE],
}


@pytest.mark.parametrize("mount", MOUNTED)
def test_own_view_streams_wherever_the_endpoint_is_mounted(database: Database, mount: str) -> None:
    origin = Origin()
    with behind_a_proxy, override_settings(ROOT_URLCONF=Urls(*MOUNTED[mount])):
        opened = origin.ask("/own/")
        assert opened.held
        assert origin.follow(opened).held


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ([], 'Add path("events/", include("pg_eventstream.urls")) to the URLconf'),
        ([path("rooms/<room>/", include(OURS))], "only at paths with parameters"),
        ([path("rooms/<room>/", include((OURS, "es")))], "only at paths with parameters"),
    ],
)
def test_own_view_without_an_endpoint_is_told_what_to_include(
    database: Database, patterns: list[Any], says: str
) -> None:
    with (
        behind_a_proxy,
        override_settings(ROOT_URLCONF=Urls(*patterns)),
        pytest.raises(ImproperlyConfigured, match=re.escape(says)),
    ):
        Origin().ask("/own/")
