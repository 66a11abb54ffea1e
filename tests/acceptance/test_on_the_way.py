"""Components between proxy and endpoint: a proxied stream survives them, or the log says why.

The proxy's own requests, for next links, carry no cookie and no header of the client except Host.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import override_settings

from pg_eventstream import send_events
from pg_eventstream.servers.processes import accepts
from pg_eventstream.servers.pushpin import Pushpin
from tests.project import settings
from tests.support.database import Database
from tests.support.environment import DIRECTORY, child_environment
from tests.support.forked import ForkedProcess
from tests.support.origin import Origin, behind_a_proxy, log_in
from tests.support.publisher import PublisherProcess
from tests.support.sse_client import SSEClient

LOGIN_REQUIRED = "django.contrib.auth.middleware.LoginRequiredMiddleware"
# As many as can be combined, in the order of their documentation.
_MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.gzip.GZipMiddleware",
    "django.middleware.http.ConditionalGetMiddleware",
    *settings.MIDDLEWARE[:2],
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    *settings.MIDDLEWARE[2:],
    LOGIN_REQUIRED,
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
EXEMPT = r"(^|/)next[-/]"  # as in the system check and the documentation
TLS: dict[str, Any] = {
    "MIDDLEWARE": ["django.middleware.security.SecurityMiddleware", *settings.MIDDLEWARE],
    "SECURE_SSL_REDIRECT": True,
    "SECURE_PROXY_SSL_HEADER": ["HTTP_X_FORWARDED_PROTO", "https"],
    "SECURE_REDIRECT_EXEMPT": [EXEMPT],
}
EVERYTHING: dict[str, Any] = {
    **TLS,
    "MIDDLEWARE": _MIDDLEWARE,
    "ROOT_URLCONF": "tests.project.i18n_urls",
    "USE_I18N": True,
    "APPEND_SLASH": True,
}
DRF: dict[str, Any] = {
    "ROOT_URLCONF": "tests.project.drf_urls",
    "INSTALLED_APPS": [
        *settings.INSTALLED_APPS,
        "django.contrib.staticfiles",
        "rest_framework",
    ],
    "MIDDLEWARE": [*settings.MIDDLEWARE, LOGIN_REQUIRED],
    "REST_FRAMEWORK": {
        "DEFAULT_AUTHENTICATION_CLASSES": ["rest_framework.authentication.SessionAuthentication"],
        "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
        "DEFAULT_THROTTLE_CLASSES": ["rest_framework.throttling.UserRateThrottle"],
        "DEFAULT_THROTTLE_RATES": {"user": "1/day"},
        "DEFAULT_VERSIONING_CLASS": "rest_framework.versioning.AcceptHeaderVersioning",
    },
}
SCRIPT_NAME: dict[str, Any] = {"FORCE_SCRIPT_NAME": "/stripped"}
OPENED = "/events/"
STRIPPED = f"/stripped{OPENED}"
ROOT_PATH = "--root-path=/stripped"


class Way:
    """A server, its settings, and the path at which a client asks the proxy for a stream."""

    def __init__(self, server: str, path: str = OPENED, *arguments: str, **settings: Any) -> None:
        self.server = server
        self.path = path
        self.arguments = arguments
        self.settings = settings


WAYS = {
    "login is required": Way("asgi", MIDDLEWARE=[*settings.MIDDLEWARE, LOGIN_REQUIRED]),
    "TLS ends before the proxy": Way("wsgi", **TLS),
    "everything at once": Way("asgi", "/en/i18n/", **EVERYTHING),
    "DRF outside a router": Way("asgi", "/view/any/", **DRF),
    "DRF in a router": Way("wsgi", "/events/", **DRF),
    "WSGI, prefix off before the proxy": Way("wsgi", **SCRIPT_NAME),
    "WSGI, prefix off at the proxy": Way("wsgi", STRIPPED, **SCRIPT_NAME),
    "ASGI, prefix off before the proxy": Way("asgi", **SCRIPT_NAME),
    "ASGI, prefix off at the proxy": Way("asgi", STRIPPED, **SCRIPT_NAME),
    "uvicorn, prefix off before the proxy": Way("asgi", OPENED, ROOT_PATH),
    "uvicorn, prefix off at the proxy": Way("asgi", STRIPPED, ROOT_PATH),
    "daphne, prefix off at the proxy": Way("daphne", STRIPPED, ROOT_PATH),
    "daphne, prefix off before the proxy": Way("daphne", OPENED, ROOT_PATH),
    "own view, prefix off at the proxy": Way(
        "asgi", "/stripped/own/", ROOT_URLCONF="tests.project.i18n_urls", **SCRIPT_NAME
    ),
    "own view, prefix off before the proxy": Way(
        "wsgi", "/own/", ROOT_URLCONF="tests.project.i18n_urls", **SCRIPT_NAME
    ),
}
SERVERS = {
    "asgi": ["uvicorn", "tests.project.asgi:application", "--port={port}", "--log-level=warning"],
    "daphne": ["daphne", "tests.project.asgi:application", "--port={port}"],
    "wsgi": ["gunicorn", "tests.project.wsgi", "--bind=127.0.0.1:{port}", "--threads=8"],
}
RARE = ("daphne", "uvicorn", "own view", "DRF in")


@pytest.fixture
def way(
    request: pytest.FixtureRequest, database: Database, pushpin: Pushpin, app_port: int
) -> Iterator[Way]:
    way = WAYS[request.param]
    arguments = [argument.format(port=app_port) for argument in SERVERS[way.server]]
    process = ForkedProcess(
        f"the application server ({way.server})",
        [sys.executable, "-m", *arguments, *way.arguments],
        log_path=DIRECTORY / "app.log",
        environment=child_environment(
            pushpin, PG_EVENTSTREAM_TEST_SETTINGS=json.dumps(way.settings)
        ),
    )
    process.start(ready=lambda: accepts(app_port))
    yield way
    process.kill()


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(name, marks=pytest.mark.thorough if name.startswith(RARE) else ())
        for name in WAYS
    ],
    indirect=True,
)
def test_stream_continues_by_its_next_link(
    way: Way, publisher: PublisherProcess, pushpin: Pushpin, channel: str
) -> None:
    _, cookie = log_in("ann")
    headers = {"Cookie": cookie, "X-Forwarded-Proto": "https", "User-Agent": "a browser"}
    with SSEClient(f"{pushpin.url}{way.path}", [channel], headers=headers) as client:
        client.wait_open()
        # Too large to be published: the link delivers them, and the next one.
        texts = [f"{n}" * 500_000 for n in range(2)]
        for n, text in enumerate(texts):
            send_events([(channel, "message", text, None, False)])
            assert [event.data for event in client.wait_count(n + 1)] == texts[: n + 1]
        assert client.connections == 1


def test_visitor_opens_no_stream_where_login_is_required(database: Database) -> None:
    middleware = [*settings.MIDDLEWARE, LOGIN_REQUIRED]
    with behind_a_proxy, override_settings(MIDDLEWARE=middleware):
        assert Origin().ask("/events/?channel=c").status == 302
        _, cookie = log_in("ann")
        opened = Origin().ask("/events/?channel=c", {"Cookie": cookie})
        assert Origin().follow(opened).held


def test_path_below_a_script_name_is_left_alone_if_it_is_no_link_of_ours(
    database: Database,
) -> None:
    """The words of the script name can occur again in a project's own paths."""
    with behind_a_proxy, override_settings(FORCE_SCRIPT_NAME="/events"):
        link = Origin().ask("/events/?channel=c").next_link
        assert link.startswith("/events/events/next-")
        for path, status in ((link, 200), (f"{link}x", 404), ("/events/events/", 404)):
            headers = {"Grip-Last": "events-c; last-id=0"}
            assert Origin().ask(path, headers).status == status
