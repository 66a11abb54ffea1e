"""The log of a server reports faults of its proxy and its publisher."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.test import override_settings

from pg_eventstream import liveness, send_event
from pg_eventstream.grip import next_links
from pg_eventstream.grip import signature as signatures
from pg_eventstream.rarely import Rarely
from pg_eventstream.servers.processes import accepts, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.project import settings
from tests.support.database import Database
from tests.support.environment import DIRECTORY, KEY, child_environment
from tests.support.forked import ForkedProcess
from tests.support.logged import OTHER_KEY, START, Log, look
from tests.support.origin import behind_a_proxy
from tests.support.publisher import NewPublisher, PublisherProcess
from tests.support.roles import granted
from tests.support.sse_client import SSEClient
from tests.support.stored import make_older


@pytest.fixture(autouse=True)
def afresh(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset the warnings that are logged once."""
    for module in (next_links, signatures, liveness):
        monkeypatch.setattr(module, "_rarely", Rarely())
    monkeypatch.setattr(liveness, "_check_is_due", Rarely())
    with behind_a_proxy:
        yield


class Server(ForkedProcess):
    """The application behind the proxy, and its log."""

    @property
    def log(self) -> str:
        return (DIRECTORY / "app.log").read_text()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.log, timeout=30)


@pytest.fixture
def serve(database: Database, pushpin: Pushpin, app_port: int) -> Iterator[Callable[..., Server]]:
    """Starts the application with these settings, and ends it with the test."""
    started: list[Server] = []

    def start(server: str = "asgi", **settings: Any) -> Server:
        arguments = {
            "asgi": ["uvicorn", "tests.project.asgi:application", f"--port={app_port}"],
            "wsgi": [
                "gunicorn",
                "tests.project.wsgi",
                f"--bind=127.0.0.1:{app_port}",
                "--threads=8",
            ],
        }[server]
        (DIRECTORY / "app.log").unlink(missing_ok=True)
        process = Server(
            f"the application server ({server})",
            [sys.executable, "-m", *arguments],
            log_path=DIRECTORY / "app.log",
            environment=child_environment(
                pushpin, PG_EVENTSTREAM_TEST_SETTINGS=json.dumps(settings)
            ),
        )
        started.append(process)
        process.start(ready=lambda: accepts(app_port))
        return process

    yield start
    for process in started:
        process.kill()


# A next link that another component answers


@pytest.mark.parametrize("server", ["asgi", "wsgi"])
def test_next_link_that_a_middleware_answers_is_logged(
    server: str, serve: Callable[..., Server], pushpin: Pushpin, channel: str
) -> None:
    app = serve(
        server, MIDDLEWARE=[*settings.MIDDLEWARE, "tests.project.middleware.only_with_a_cookie"]
    )
    with SSEClient(f"{pushpin.url}/events/", [channel], headers={"Cookie": "a=b"}) as client:
        client.wait_open()
        app.wait_for("the view 'pg_eventstream-next' does not get its request")


def test_stream_whose_next_link_a_middleware_lets_through_continues(
    serve: Callable[..., Server], publisher: PublisherProcess, pushpin: Pushpin, channel: str
) -> None:
    app = serve(
        "wsgi",
        MIDDLEWARE=[*settings.MIDDLEWARE, "tests.project.middleware.only_links_without_a_cookie"],
    )
    with SSEClient(f"{pushpin.url}/events/", [channel], headers={"Cookie": "a=b"}) as client:
        client.wait_open()
        send_event(channel, "message", "x" * 500_000)  # only the link delivers it
        client.wait_count(1)
    assert "does not get its request" not in app.log


@pytest.mark.parametrize("server", ["asgi", "wsgi"])
def test_path_that_was_changed_on_the_way_is_logged(
    server: str, serve: Callable[..., Server], pushpin: Pushpin, channel: str
) -> None:
    """The application is not told of the prefix that was removed, so its links are wrong."""
    app = serve(server)
    with SSEClient(f"{pushpin.url}/stripped/events/", [channel]) as client:
        client.wait_open()
        app.wait_for("set FORCE_SCRIPT_NAME to the prefix")


# A signature that cannot be verified


def test_stream_through_a_proxy_with_another_key_is_direct_and_logged(
    serve: Callable[..., Server], pushpin: Pushpin, channel: str
) -> None:
    app = serve(GRIP_URL=f"{pushpin.control_url}?key={OTHER_KEY}")
    with SSEClient(f"{pushpin.url}/events/", [channel]) as client:
        client.wait_open()
        send_event(channel, "message", 1)  # no publisher runs, so the process sequences
        client.wait_count(1)
    app.wait_for("Compare the key in GRIP_URL")
    assert OTHER_KEY not in app.log
    assert KEY not in app.log


@pytest.mark.parametrize("server", ["asgi", "wsgi"])
def test_stream_that_opens_without_a_publisher_is_logged_once(
    server: str, serve: Callable[..., Server], pushpin: Pushpin, channel: str
) -> None:
    app = serve(server)
    for n in range(2):
        with SSEClient(f"{pushpin.url}/events/", [f"{channel}{n}"]) as client:
            client.wait_open()
    app.wait_for(START)
    assert app.log.count("No publisher has ever run") == 1


def test_healthy_publisher_is_nothing_to_log(
    publisher: PublisherProcess,
    serve: Callable[..., Server],
    pushpin: Pushpin,
    channel: str,
    caplog: Log,
) -> None:
    app = serve()
    with SSEClient(f"{pushpin.url}/events/", [channel]) as client:
        client.wait_open()
        send_event(channel, "message", 1)
        client.wait_count(1)
    with override_settings(GRIP_URL=f"{pushpin.control_url}?key={KEY}"):
        assert look(caplog) == []
    assert "ublisher" not in app.log


def test_proxy_that_cannot_be_reached_is_noticed(
    database: Database, new_publisher: NewPublisher, caplog: Log
) -> None:
    send_event("c", "message", 1)
    new_publisher(PG_EVENTSTREAM_TEST_GRIP_URL=f"http://127.0.0.1:1?key={KEY}").lead()
    wait_until(
        lambda: database.value("SELECT count(*) FROM pg_eventstream_stream") == 1, timeout=20
    )
    make_older(database, 40)
    [message] = look(caplog)
    assert "Events have waited for the proxy http://127.0.0.1:1" in message


def test_direct_stream_of_a_role_that_may_not_sequence_is_logged(
    database: Database, serve: Callable[..., Server], app_port: int, channel: str
) -> None:
    role = granted(database, "endpoint")
    database.execute(f"REVOKE ALL ON FUNCTION pg_eventstream_sequence() FROM {role}")
    default = {**settings.DATABASES["default"], "NAME": database.name, "USER": role}
    app = serve(GRIP_URL=None, DATABASES={"default": default}, EVENTSTREAM_SAFETY_POLL=0.1)
    with SSEClient(f"http://127.0.0.1:{app_port}/events/", [channel]) as client:
        client.wait_open()
        app.wait_for("hub: no publisher leads")
    assert START in app.log
