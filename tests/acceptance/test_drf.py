"""Streams of Django REST Framework's views through a proxy, and their page in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import override_settings

from pg_eventstream import send_events
from pg_eventstream.servers.processes import Process
from pg_eventstream.servers.pushpin import Pushpin
from tests.project.app.models import Membership
from tests.project.drf_settings import DRF
from tests.support.browser import Page
from tests.support.database import Database
from tests.support.members import member, token
from tests.support.origin import behind_a_proxy
from tests.support.publisher import PublisherProcess
from tests.support.rounds import sequence
from tests.support.sse_client import OpenStream, SSEClient


@pytest.fixture(autouse=True)
def project(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use these settings here and in the servers of the test."""
    monkeypatch.setenv("PG_EVENTSTREAM_TEST_SETTINGS", json.dumps(DRF))
    with behind_a_proxy, override_settings(**DRF):
        yield


@pytest.fixture
def stream(app: Process, pushpin: Pushpin) -> Iterator[OpenStream]:
    """Opens streams at paths through the proxy, and closes them with the test."""
    opened: list[SSEClient] = []

    def open_stream(path: str, *channels: str, **options: Any) -> SSEClient:
        client = SSEClient(f"{pushpin.url}{path}", list(channels), **options)
        opened.append(client.__enter__())
        return client

    yield open_stream
    for client in opened:
        client.close()


def send(channel: str, *data: str, event_type: str = "message") -> None:
    send_events([(channel, event_type, text, None, False) for text in data])


SELDOM = (pytest.mark.faults, pytest.mark.thorough)


@pytest.mark.parametrize(
    "path", ["/events/{}/", "/nested/events/{}/", pytest.param("/bare/{}", marks=SELDOM)]
)
def test_events_arrive_and_are_resumed_page_by_page(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str, path: str
) -> None:
    channel = f"public-{channel}"
    path = path.format(channel)
    first = stream(path).wait_open()
    send(channel, "live")
    assert [event.data for event in first.wait_count(1)] == ["live"]
    first.close()
    missed = [f"{number} {'x' * 9_000}" for number in range(50)]  # several pages
    send(channel, *missed)
    sequence(database)
    resumed = stream(path, last_event_id=f"{channel}:1")
    assert [event.data for event in resumed.wait_count(50)] == missed
    send(channel, "live again")
    assert resumed.wait_count(51)[-1].data == "live again"
    assert [event.eids[channel] for event in resumed.events] == list(range(2, 53))
    assert resumed.connections == 1


def test_stream_outlasts_its_links_until_the_permission_is_gone(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(f"/members/{channel}/", headers=token(member("ada", channel))).wait_open()
    # Too large to be published: the next link delivers it.
    send(channel, "x" * 500_000, "small")
    assert [len(event.data) for event in client.wait_count(2)] == [500_000, 5]
    Membership.objects.all().delete()
    assert client.ended.wait(30)
    assert json.loads(client.control[-1].data)["condition"] == "forbidden"
    assert stream(f"/members/{channel}/").ended.wait(10)


def test_page_shows_events_as_they_arrive_and_only_as_text(
    publisher: PublisherProcess, app: Process, pushpin: Pushpin, page: Page, channel: str
) -> None:
    page.goto(f"{pushpin.url}/events/public-{channel}/?messages_types=message,info")
    page.wait_for("document.querySelector('[data-role=state]').textContent === 'open'")
    hostile = "<img src=x onerror=\"document.title = 'run'\">"
    send(f"public-{channel}", hostile)
    send(f"public-{channel}", "not shown", event_type="other")
    send(f"public-{channel}", hostile, event_type="info")
    rows = "[...document.querySelectorAll('[data-role=events] tr')]"
    page.wait_for(f"{rows}.length === 2")
    shown = page.evaluate(f"{rows}.map((row) => [...row.cells].map((cell) => cell.textContent))")
    assert [[cell.strip() for cell in cells[1:]] for cells in shown] == [
        ["info", f"public-{channel}:3", hostile],
        ["message", f"public-{channel}:1", hostile],
    ]
    assert page.evaluate("document.querySelectorAll('[data-role=events] img').length") == 0
    assert page.evaluate("document.title") != "run"
    page.evaluate("document.querySelector('[data-role=clear]').click()")
    page.wait_for(f"{rows}.length === 0")
    assert page.console == []


def test_page_says_that_its_stream_was_refused(
    app: Process, pushpin: Pushpin, page: Page, channel: str
) -> None:
    page.goto(f"{pushpin.url}/events/{channel}/")
    page.wait_for("document.querySelector('[data-role=state]').textContent === 'ended'")
    text = page.evaluate("document.querySelector('[data-role=events]').textContent")
    assert "forbidden" in text


@pytest.mark.parametrize(
    ("path", "condition", "goes_on"),
    [
        ("/members/?channels=public-a", "unauthorized", False),  # 401
        pytest.param("/nobody/?channels=public-a", "forbidden", False, marks=SELDOM),  # 403
        pytest.param("/function/?channels=public-a", "bad-request", False, marks=SELDOM),
        ("/events/?channels=secret", "forbidden", False),  # by the channel manager
        ("/throttled/?channels=public-a", "too-many-requests", True),
    ],
)
def test_page_that_is_refused_stops_reconnecting_unless_the_refusal_is_temporary(
    app: Process, pushpin: Pushpin, page: Page, path: str, condition: str, goes_on: bool
) -> None:
    page.goto(f"{pushpin.url}/class/")
    page.evaluate(
        """(path) => {
            window.errors = [];
            const open = () => {
                window.source = new ReconnectingEventSource(path, { max_retry_time: 10 });
                source.addEventListener("stream-open", () => { source.close(); open(); });
                source.addEventListener("stream-error", ({ data }) =>
                    errors.push(JSON.parse(data).condition));
            };
            open();
        }""",
        path,
    )
    page.wait_for(f"errors.length === 1 && source.readyState === {0 if goes_on else 2}")
    assert page.evaluate("errors") == [condition]
