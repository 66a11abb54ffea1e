"""The browser client, as a module and as a classic script, in a real Chromium."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from pg_eventstream import send_events
from pg_eventstream.servers.processes import Process, accepts, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support import pages
from tests.support.browser import Browser, Page
from tests.support.database import Database
from tests.support.documentation import example
from tests.support.network import Network
from tests.support.publisher import PublisherProcess
from tests.support.scripted_server import Answer, Request, ScriptedServer, answer
from tests.support.sse_client import OpenStream

Serve = Callable[..., ScriptedServer]

ROOT = Path(__file__).parents[2]
AT_ONCE = "() => { Math.random = () => 0; }"
AT_THE_LATEST = "() => { Math.random = () => 0.9999; }"
OPEN = "event: stream-open\nid: a:0\ndata:\n\n"


# The classic script is generated from the module (see `test_both_scripts_are_one`).
_CLASSIC = pytest.param("classic", marks=[pytest.mark.faults, pytest.mark.thorough])
both_kinds = pytest.mark.parametrize("kind", pages.KINDS, indirect=True)


@pytest.fixture(params=["module", _CLASSIC])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def serve(page: Page, kind: str) -> Iterator[Serve]:
    """A server with these responses. The page comes from it and has loaded the client."""
    with ExitStack() as stack:

        def start(*answers: Answer, before: str = AT_ONCE) -> ScriptedServer:
            server = stack.enter_context(ScriptedServer(*answers))
            page.goto(f"{server.url}/pages/{kind}/")
            page.evaluate(before)
            return server

        yield start


def received(page: Page) -> list[dict[str, str]]:
    events: list[dict[str, str]] = page.evaluate("received")
    return events


def wait_requests(server: ScriptedServer, count: int, timeout: float = 30) -> list[Request]:
    wait_until(lambda: len(server.requests) >= count, timeout=timeout)
    return server.requests


def resumed_from(request: Request) -> str | None:
    return dict(parse_qsl(urlsplit(request.target).query)).get("lastEventId")


def gaps(requests: Sequence[Request]) -> list[float]:
    return [b.at - a.at for a, b in itertools.pairwise(requests)]


# Through the real proxy


@pytest.fixture
def server_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "ROOT_URLCONF": "tests.support.pages.urls",
        "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channelmanagers.StaffOnly",
    }
    monkeypatch.setenv("PG_EVENTSTREAM_TEST_SETTINGS", json.dumps(settings))


@pytest.fixture
def application(server_settings: None, app: Process) -> Process:
    """The application, with the pages."""
    return app


class Sender:
    """Sends numbered events from a separate thread until the test has seen enough.

    Every third event is of a type that the page does not listen to.
    """

    def __init__(self, database: Database, channel: str) -> None:
        self.sent: list[str] = []
        self._database = database
        self._channel = channel
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join(20)

    def _run(self) -> None:
        number = 0
        with self._database.connect() as connection:
            while not self._enough.wait(0.005):
                unlisted = number % 3 == 2
                connection.execute(
                    "INSERT INTO pg_eventstream_event (channel, type, data) VALUES (%s, %s, %s)",
                    [self._channel, "unlisted" if unlisted else "message", str(number)],
                )
                if not unlisted:
                    self.sent.append(str(number))
                number += 1


@pytest.mark.parametrize("kind", ["module", _CLASSIC], indirect=True)
def test_no_event_is_missing_or_repeated_whichever_connection_breaks(
    application: Process,
    app_port: int,
    pushpin: Pushpin,
    database: Database,
    publisher: PublisherProcess,
    page: Page,
    kind: str,
    channel: str,
) -> None:
    options = {"max_retry_time": 300, "max_silence_time": 3000}

    def connections_lost() -> int:
        return int(page.evaluate("states.filter((state) => state === 'error 0').length"))

    def goes_on() -> None:
        """Wait until the page is connected and has events that were sent after this call."""
        page.wait_for("(count) => received.length > count", len(sender.sent), timeout=60)

    with Network(pushpin.port) as network:
        page.goto(f"{network.url}/pages/{kind}/")
        page.evaluate(
            "([url, options]) => listen(url, options)",
            [f"/events/?channel={channel}", options],
        )
        page.wait_for("source.readyState === 1")
        with Sender(database, channel) as sender:
            goes_on()

            lost = connections_lost()
            pushpin.kill()
            wait_until(lambda: connections_lost() >= lost + 2, timeout=30)
            pushpin.start()
            goes_on()

            lost = connections_lost()
            application.kill()
            network.cut()
            network.heal()
            wait_until(lambda: connections_lost() >= lost + 2, timeout=30)
            application.start(ready=lambda: accepts(app_port))
            goes_on()

            lost = connections_lost()
            network.cut()
            wait_until(lambda: connections_lost() >= lost + 3, timeout=30)
            network.heal()
            goes_on()

            lost = connections_lost()
            network.deaf()
            wait_until(lambda: connections_lost() >= lost + 1, timeout=30)
            network.heal()  # what was held back arrives late, when no client waits for it
            goes_on()
        page.wait_for("(last) => received.at(-1)?.data === last", sender.sent[-1], timeout=60)
    assert [event["data"] for event in received(page)] == sender.sent


@both_kinds
def test_texts_and_ids_arrive_as_they_were_sent(
    application: Process,
    pushpin: Pushpin,
    publisher: PublisherProcess,
    page: Page,
    kind: str,
    channel: str,
) -> None:
    texts = ["", "two\nlines", " 日本 🎉 \ufeffü ", "100 %s %I", "{}", "x" * 300_000, "last"]
    page.goto(f"{pushpin.url}/pages/{kind}/")
    types = ["message", "stream-open", "ä b: c"]
    page.evaluate(
        "([url, types]) => listen(url, {}, types)", [f"/events/?channel={channel}", types]
    )
    page.wait_for("received.length === 1")
    send_events([(channel, "ä b: c", text, None, False) for text in texts])
    page.wait_for("(count) => received.length === count", len(texts) + 1)
    opened, *events = received(page)
    assert (opened["type"], opened["data"], opened["id"]) == ("stream-open", "", f"{channel}:0")
    assert [event["data"] for event in events] == texts
    assert [event["id"].strip() for event in events] == [
        f"{channel}:{n + 1}" for n in range(len(texts))
    ]
    assert {event["type"] for event in events} == {"ä b: c"}
    assert {event["origin"] for event in events} == {pushpin.url}
    assert page.console == []


def test_page_starts_from_the_earliest_event_or_from_one_that_it_names(
    application: Process,
    pushpin: Pushpin,
    publisher: PublisherProcess,
    page: Page,
    kind: str,
    channel: str,
) -> None:
    send_events([(channel, "message", str(n), None, False) for n in range(5)])
    page.goto(f"{pushpin.url}/pages/{kind}/")
    page.evaluate(
        "([url, lastEventId]) => listen(url, { lastEventId })",
        [f"/events/?channel={channel}", f"{channel}:2"],
    )
    page.wait_for("received.length === 3")
    assert [event["data"] for event in received(page)] == ["2", "3", "4"]


def test_page_that_may_not_read_stops_asking(
    application: Process, pushpin: Pushpin, page: Page, kind: str, channel: str
) -> None:
    page.goto(f"{pushpin.url}/pages/{kind}/")
    page.evaluate(AT_ONCE)
    page.evaluate(
        "(url) => listen(url, {}, ['stream-error', 'message'])", f"/events/?channel=staff{channel}"
    )
    page.wait_for("source.readyState === 2")
    (event,) = received(page)
    assert event["type"] == "stream-error"
    assert json.loads(event["data"])["condition"] == "forbidden"
    assert page.evaluate("states") == ["open 1", "error 2"]
    _others_go_on_asking(page)
    assert len([url for url in page.requests if channel in url]) == 1


def _others_go_on_asking(page: Page) -> None:
    """Wait long enough for a client that might have sent another request."""
    page.evaluate(
        """() => {
            window.tries = 0;
            const other = new ReconnectingEventSource("/nothing/here/");
            other.onerror = () => (++window.tries === 8) && other.close();
        }"""
    )
    page.wait_for("tries === 8")


@pytest.fixture
def page_of_a_whole_browser() -> Iterator[Page]:
    with Browser("chromium") as browser:
        yield browser.new_page()


def test_page_that_is_restored_from_the_history_continues(
    application: Process,
    pushpin: Pushpin,
    publisher: PublisherProcess,
    stream: OpenStream,
    page_of_a_whole_browser: Page,
    kind: str,
    channel: str,
) -> None:
    page = page_of_a_whole_browser
    witness = stream(channel).wait_open()
    page.goto(f"{pushpin.url}/pages/{kind}/")
    page.evaluate("(url) => listen(url)", f"/events/?channel={channel}")
    page.wait_for("source.readyState === 1")
    send_events([(channel, "message", "seen", None, False)])
    page.wait_for("received.length === 1")
    page.goto(f"{pushpin.url}/static/pg_eventstream/reconnecting-eventsource.mjs")
    # More than a browser caches of a page; it would drop a page with a connection.
    missed = [f"{n} ".ljust(90_000, "x") for n in range(20)]
    send_events([(channel, "message", text, None, False) for text in missed])
    witness.wait_count(1 + len(missed))
    page.go_back()
    page.wait_for("(count) => window.received?.length === count", 1 + len(missed))
    # The same page, not a new one.
    assert [event["data"] for event in received(page)] == ["seen", *missed]


# Resuming


def test_ids_of_events_without_a_listener_are_resumed_from(page: Page, serve: Serve) -> None:
    server = serve(
        answer(OPEN + "id: a:1\ndata: 1\n\nevent: unlisted\nid: a:2\ndata: 2\n\n"),
        answer("id: a:3\n\n"),  # not an event, but its id counts
        answer("id: a:4\ndata: incomplete\n"),
        answer("id: a:5 \ndata: 5\n\n", hold=True),
    )
    page.evaluate("listen('/events/')")
    page.wait_for("received.length === 2")
    assert [event["data"] for event in received(page)] == ["1", "5"]
    assert [resumed_from(request) for request in server.requests] == [None, "a:2", "a:3", "a:3"]


@pytest.mark.parametrize(
    ("url", "first", "second"),
    [
        ("/events/", "/events/", "/events/?lastEventId=a%3A1%2Cb%3A2%20"),
        ("../../events/?x=a%20b+c&&y#hash", "/events/?x=a%20b+c&&y", None),
        ("/events/?lastEventId=old&x=1&lastEventId=", "/events/?lastEventId=old&x=1&lastEventId=",
         "/events/?x=1&lastEventId=a%3A1%2Cb%3A2%20"),
    ],
)  # fmt: skip
def test_id_replaces_the_one_in_the_url_and_leaves_the_rest_of_it_alone(
    page: Page, serve: Serve, url: str, first: str, second: str | None
) -> None:
    server = serve(answer("id: a:1,b:2 \ndata:\n\n"), Answer(status=204))
    page.evaluate("(url) => listen(url)", url)
    page.wait_for("source.readyState === 2")
    second = second or "/events/?x=a%20b+c&y&lastEventId=a%3A1%2Cb%3A2%20"
    assert [request.target for request in server.requests] == [first, second]


def test_option_says_where_to_start(page: Page, serve: Serve) -> None:
    server = serve(Answer(status=500), Answer(status=204))
    page.evaluate("listen('/events/?lastEventId=old', { lastEventId: 'earliest' })")
    page.wait_for("source.readyState === 2")
    assert [resumed_from(request) for request in server.requests] == ["earliest"] * 2


# Reconnecting, or not


def test_http_errors_and_other_contents_are_tried_again(page: Page, serve: Serve) -> None:
    statuses = [500, 502, 503, 404, 403, 400, 501, 429]
    html = Answer([b"data: no stream\n\n"], content_type="text/html")
    server = serve(*(Answer(status=status) for status in statuses), html, answer(OPEN, hold=True))
    page.evaluate("listen('/events/', {}, ['message', 'stream-open'])")
    page.wait_for("source.readyState === 1 && received.length > 0")
    assert len(server.requests) == len(statuses) + 2
    assert page.evaluate("states") == ["error 0"] * (len(statuses) + 1) + ["open 1"]
    assert [event["type"] for event in received(page)] == ["stream-open"]


def test_waits_grow_up_to_the_limit(page: Page, serve: Serve) -> None:
    server = serve(answer("retry: 50\ndata:\n\n"), Answer(status=500), before=AT_THE_LATEST)
    page.evaluate("listen('/events/', { max_retry_time: 500 })")
    waits = gaps(wait_requests(server, 9))
    for wait, least in zip(waits, [0.05, 0.1, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5], strict=False):
        assert wait > least * 0.99
    assert max(waits) < 3  # without a limit the last would be 6.4


# What the client waits, without waiting for it. Its other timers are for silence.
NOTE_WAITS = """() => {
    const set = setTimeout;
    window.waits = [];
    window.setTimeout = (callback, wait) => {
        if (callback.toString().includes("abort")) return set(callback, wait);
        waits.push(wait);
        return window.waits.length < 9 ? set(callback, 0) : 0;
    };
}"""


# The retry: of a stream, that of each error, the random numbers, and the resulting waits.
WAITS: list[tuple[str, str, float, list[float]]] = [
    # Without retry: anywhere from zero to the limit, so that pages do not reconnect together.
    ("", "", 0, [0] * 9),
    ("", "", 0.5, [500, 1000, 2000, 4000, 5000, 5000]),
    # The server's retry: is the delay.
    ("retry: 700", "", 0, [700] * 9),
    ("retry: 700", "", 0.5, [1050, 1400, 2100, 3500, 5700, 5700]),
    ("retry: 20000", "", 0, [20_000] * 9),  # longer than the maximum that the client adds
    ("retry: 20000", "", 0.5, [25_000] * 9),
    ("retry: 0", "", 0, [1] * 9),
    ("retry: 0", "", 0.5, [1.5, 2, 3, 5, 9, 17, 33]),
    ("retry: 99999999999999999999", "", 0.5, [2**31 - 1] * 9),
    ("retry: 1x", "", 0, [0] * 9),
    ("retry: 5\nretry: 700", "", 0, [700] * 9),
    ('retry: 700\nevent: stream-error\nid: error\ndata: {"condition": "x"}', "", 0, [700] * 9),
    # The longer of two delays.
    ("retry: 700", "3", 0, [700, 3000, 3000]),
    ("retry: 700", "3", 0.5, [1050, 3700, 4400]),
    ("retry: 5000", "3", 0, [5000] * 9),
    ("", "3", 0.5, [500, 4000, 5000, 7000, 8000, 8000]),
]


def test_server_says_how_long_to_wait_and_chance_only_adds_to_it(page: Page, serve: Serve) -> None:
    server = serve(answer(""))
    page.evaluate(NOTE_WAITS)
    for first, then, chance, waits in WAITS:
        headers = {"Retry-After": then} if then else {}
        server.answers = [answer(f"{first}\ndata:\n\n"), Answer(status=503, headers=headers)]
        page.evaluate("(chance) => { waits.length = 0; Math.random = () => chance; }", chance)
        page.evaluate("listen('/events/')")
        page.wait_for("waits.length === 9")
        assert page.evaluate("waits")[: len(waits)] == pytest.approx(waits), (first, then, chance)
        page.evaluate("source.close()")


@pytest.mark.parametrize(
    "event",
    ["document.dispatchEvent(new Event('visibilitychange'))", "dispatchEvent(new Event('online'))"],
)
def test_page_that_is_looked_at_again_waits_if_the_server_says_so(
    page: Page, serve: Serve, event: str
) -> None:
    server = serve(
        Answer(status=503, headers={"Retry-After": "600"}), answer("data: 1\n\n", hold=True)
    )
    page.evaluate("listen('/events/')")
    page.wait_for("states.length === 1")
    page.evaluate(event)
    _others_go_on_asking(page)
    assert len(server.requests) == 1
    page.evaluate("{ const now = Date.now; Date.now = () => now() + 600_000; }")
    page.evaluate(event)
    page.wait_for("received.length === 1")


def test_only_a_connection_that_proved_itself_shortens_the_waits(page: Page, serve: Serve) -> None:
    crashing = answer(OPEN)
    server = serve(
        answer("retry: 50\n" + OPEN),
        *[crashing] * 5,
        answer("event: keep-alive\ndata:\n\n"),
        crashing,
        before=AT_THE_LATEST,
    )
    page.evaluate("listen('/events/', { max_retry_time: 60_000 })")
    waits = gaps(wait_requests(server, 9))
    for wait, least in zip(waits, [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 0.05], strict=False):
        assert wait > least * 0.99
    assert waits[6] < 3  # after the keep-alive; it would have been 3.2


@both_kinds
def test_silent_connection_is_replaced(page: Page, serve: Serve) -> None:
    server = serve(answer("id: a:1\ndata: 1\n\n", hold=True), answer("data: 2\n\n", hold=True))
    page.evaluate("listen('/events/', { max_silence_time: 1000 })")
    page.wait_for("received.length === 2")
    assert [resumed_from(request) for request in server.requests[:2]] == [None, "a:1"]
    assert gaps(server.requests)[0] > 0.99
    assert page.evaluate("states.slice(0, 3)") == ["open 1", "error 0", "open 1"]


def test_connection_that_is_kept_alive_is_kept(page: Page, serve: Serve) -> None:
    comments = [b": nothing new\n"] * 12
    server = serve(Answer([*comments, b"data: at last\n\n"], pause=0.2, hold=True))
    page.evaluate("listen('/events/', { max_silence_time: 1000 })")
    page.wait_for("received.length === 1")
    assert len(server.requests) == 1
    assert page.evaluate("states") == ["open 1"]


def test_silence_is_no_fault_where_the_page_says_so(page: Page, serve: Serve) -> None:
    server = serve(answer("data: 1\n\n", hold=True))
    page.evaluate("listen('/events/', { max_silence_time: Infinity })")
    page.wait_for("received.length === 1")
    _others_go_on_asking(page)
    assert len(server.requests) == 1
    assert page.evaluate("states") == ["open 1"]


@pytest.mark.parametrize("condition", ["forbidden", "bad-request"])
def test_final_error_ends_it_for_good(page: Page, serve: Serve, condition: str) -> None:
    error = f'event: stream-error\nid: error\ndata: {{"condition": "{condition}"}}\n\n'
    server = serve(answer(OPEN + error + "data: too late\n\n", hold=True))
    page.evaluate("listen('/events/', {}, ['message', 'stream-error'])")
    page.wait_for("source.readyState === 2")
    _others_go_on_asking(page)
    assert [event["type"] for event in received(page)] == ["stream-error"]
    assert page.evaluate("states") == ["open 1", "error 2"]
    assert len(server.requests) == 1


@pytest.mark.parametrize("data", ['{"condition": "internal-error"}', "no JSON", "null"])
def test_other_errors_are_overcome_from_the_last_good_id(
    page: Page, serve: Serve, data: str
) -> None:
    error = f"event: stream-error\nid: error\ndata: {data}\n\ndata: too late\n\n"
    server = serve(
        answer("id: a:7\ndata: 1\n\n" + error, hold=True),
        answer(error),
        answer("data: 2\n\n", hold=True),
    )
    page.evaluate("listen('/events/', {}, ['message', 'stream-error'])")
    page.wait_for("received.length === 4")
    assert [event["id"] for event in received(page)] == ["a:7", "error", "error", "a:7"]
    assert [resumed_from(request) for request in server.requests] == [None, "a:7", "a:7"]


@pytest.mark.parametrize("content_type", ["text/event-stream", "text/html"])
@pytest.mark.parametrize(("status", "start"), [(204, ""), (400, "error"), (401, ""), (410, "")])
def test_status_can_end_it_for_good(
    page: Page, serve: Serve, status: int, start: str, content_type: str
) -> None:
    server = serve(Answer(status=status, content_type=content_type))
    page.evaluate("(lastEventId) => listen('/events/', { lastEventId })", start)
    page.wait_for("source.readyState === 2")
    _others_go_on_asking(page)
    assert len(server.requests) == 1
    assert page.evaluate("states") == ["error 2"]


def own_refusal(status: int, condition: str, **headers: str) -> Answer:
    """The refusal that Django REST Framework sends to a client that asks for a stream."""
    text = f'event: stream-error\nid: error\ndata: {{"condition": "{condition}"}}\n\n'
    return Answer([text.encode()], status=status, headers=headers)


@pytest.mark.parametrize(
    ("status", "condition"),
    [
        (400, "bad-request"),
        (401, "unauthorized"),
        (402, "payment-required"),
        (403, "forbidden"),
        (404, "not-found"),
        (405, "method-not-allowed"),
        (406, "not-acceptable"),
        (410, "gone"),
    ],
)
def test_refusal_by_the_server_itself_ends_it_at_once(
    page: Page, serve: Serve, status: int, condition: str
) -> None:
    server = serve(own_refusal(status, condition))
    page.evaluate("listen('/events/', {}, ['message', 'stream-error'])")
    page.wait_for("source.readyState === 2")
    _others_go_on_asking(page)
    assert [json.loads(event["data"])["condition"] for event in received(page)] == [condition]
    assert page.evaluate("states") == ["error 2"]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "passing",
    [
        own_refusal(408, "request-timeout"),
        own_refusal(429, "too-many-requests"),
        own_refusal(500, "internal-server-error"),
        own_refusal(503, "service-unavailable"),
        *(Answer(status=status, content_type="text/html") for status in (502, 503, 504, 429)),
    ],
    ids=lambda answer: f"{answer.status} {answer.content_type}",
)
def test_what_passes_is_tried_again_however_often(
    page: Page, serve: Serve, passing: Answer
) -> None:
    server = serve(*[passing] * 15, answer("data: 1\n\n", hold=True))
    page.evaluate("listen('/events/')")
    page.wait_for("received.length === 1")
    assert len(server.requests) == 16
    assert page.evaluate("states") == ["error 0"] * 15 + ["open 1"]


REFUSALS = [
    *(Answer(status=status, content_type="text/html") for status in (403, 404, 405, 400)),
    Answer(status=403),
    Answer([b"please log in"], content_type="text/html"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda a: f"{a.status} {a.content_type}")
def test_refusals_of_a_moment_are_overcome_and_those_that_stay_end_it(
    page: Page, serve: Serve, refusal: Answer
) -> None:
    moments = [*[refusal] * 9, Answer(status=502), *[refusal] * 9, answer("data: 1\n\n")]
    server = serve(*moments, refusal)
    page.evaluate("listen('/events/')")
    page.wait_for("source.readyState === 2")
    assert [event["data"] for event in received(page)] == ["1"]
    _others_go_on_asking(page)
    assert len(server.requests) == len(moments) + 10


def test_redirect_to_a_page_to_log_in_is_a_refusal(page: Page, serve: Serve) -> None:
    server = serve(Answer(status=302, headers={"Location": "/pages/module/"}))
    page.evaluate("listen('/events/')")
    page.wait_for("source.readyState === 2")
    assert len(server.requests) == 10
    assert page.evaluate("states") == ["error 0"] * 9 + ["error 2"]


@pytest.mark.parametrize("status", [429, 503])
def test_waits_as_long_as_the_server_says(page: Page, serve: Serve, status: int) -> None:
    busy = own_refusal(status, "busy", **{"Retry-After": "2"})
    past = Answer(status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
    server = serve(busy, past, answer("data: 1\n\n", hold=True))
    page.evaluate("listen('/events/', { max_retry_time: 10 })")
    page.wait_for("received.length === 1")
    assert gaps(server.requests)[0] > 1.99
    assert gaps(server.requests)[1] < 1.99


@pytest.mark.parametrize("event_id", ["a:7", "errors", ""])
def test_event_that_looks_like_an_error_of_the_server_is_an_event(
    page: Page, serve: Serve, event_id: str
) -> None:
    forged = f'event: stream-error\nid: {event_id}\ndata: {{"condition": "forbidden"}}\n\n'
    server = serve(answer(OPEN + forged + "data: 1\n\n"), answer("data: 2\n\n", hold=True))
    page.evaluate("listen('/events/', {}, ['message', 'stream-error'])")
    page.wait_for("received.length === 3")
    assert [event["type"] for event in received(page)] == ["stream-error", "message", "message"]
    assert resumed_from(server.requests[1]) == (event_id or None)


def test_id_that_would_make_the_address_too_long_goes_in_a_header(page: Page, serve: Serve) -> None:
    long = ",".join(f"room{n}:{n}" for n in range(200))
    server = serve(
        answer("id: a:1\ndata:\n\n"),
        answer(f"id: {long} \ndata:\n\n"),
        answer("id: a:2\ndata:\n\n"),
        Answer(status=204),
    )
    page.evaluate("listen('/events/?x=1&lastEventId=old')")
    page.wait_for("source.readyState === 2")
    assert [
        (request.target, (request.headers["Last-Event-ID"] or "").strip())
        for request in server.requests
    ] == [
        ("/events/?x=1&lastEventId=old", ""),
        ("/events/?x=1&lastEventId=a%3A1", ""),
        ("/events/?x=1", long),
        ("/events/?x=1&lastEventId=a%3A2", ""),
    ]


def test_network_that_is_back_is_used_at_once(page: Page, serve: Serve) -> None:
    server = serve(
        answer("retry: 600000\ndata: 1\n\n"),
        answer("data: 2\n\n", hold=True),
        answer("data: 3\n\n", hold=True),
        before=AT_THE_LATEST,
    )
    page.evaluate("listen('/events/', { max_retry_time: 600_000 })")
    page.wait_for("received.length === 1 && source.readyState === 0")
    for count in (2, 3):  # while it waits; and instead of a connection over the old network
        page.set_offline(True)
        page.set_offline(False)
        page.wait_for("(count) => received.length === count", count)
    assert len(server.requests) == 3


def test_page_that_is_looked_at_again_does_not_wait(page: Page, serve: Serve) -> None:
    server = serve(
        answer("retry: 600000\ndata: 1\n\n"),
        answer("data: 2\n\n", hold=True),
        answer("data: 3\n\n", hold=True),
        before=AT_THE_LATEST,
    )
    look = "document.dispatchEvent(new Event('visibilitychange'))"
    page.evaluate("listen('/events/', { max_retry_time: 600_000 })")
    page.wait_for("received.length === 1 && source.readyState === 0")
    page.evaluate(look)
    page.wait_for("received.length === 2")
    page.evaluate(look)  # the connection is alive and is kept
    assert page.evaluate("source.readyState") == 1
    page.evaluate("{ const now = Date.now; Date.now = () => now() + 3_600_000; }")  # it has slept
    page.evaluate(look)
    page.wait_for("received.length === 3")
    assert len(server.requests) == 3


def test_page_that_is_restored_in_the_background_continues_too(page: Page, serve: Serve) -> None:
    server = serve(
        answer("id: a:1\ndata: 1\n\n", hold=True), answer("id: a:2\ndata: 2\n\n", hold=True)
    )
    page.evaluate("listen('/events/')")
    page.wait_for("received.length === 1")
    for moment in ("pagehide", "pageshow"):  # without the change of visibility after them
        page.evaluate(
            "(type) => dispatchEvent(new PageTransitionEvent(type, { persisted: true }))", moment
        )
    page.wait_for("received.length === 2")
    assert [resumed_from(request) for request in server.requests] == [None, "a:1"]


# close()


def test_nothing_comes_after_close(page: Page, serve: Serve) -> None:
    server = serve(answer("data: 1\n\ndata: 2\n\n"), answer("data: 3\n\n", hold=True))
    page.evaluate(
        """() => {
            listen("/events/");
            source.onmessage = () => source.close();
        }"""
    )
    page.wait_for("source.readyState === 2")
    page.evaluate("dispatchEvent(new Event('online'))")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    _others_go_on_asking(page)
    assert [event["data"] for event in received(page)] == ["1"]
    assert page.evaluate("[states, source.readyState]") == [["open 1"], 2]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("moment", "states"),
    [
        ("source.close()", []),
        ("source.addEventListener('open', () => source.close())", ["open 1"]),
        ("source.addEventListener('error', () => source.close())", ["open 1", "error 0"]),
        ("source.onerror = () => setTimeout(() => source.close(), 50)", ["open 1", "error 0"]),
    ],
    ids=["while connecting", "when open", "on an error", "in a wait"],
)
def test_close_is_final_at_any_moment(
    page: Page, serve: Serve, moment: str, states: list[str]
) -> None:
    server = serve(answer("data: 1\n\n"), before=AT_THE_LATEST)
    page.evaluate(f"() => {{ listen('/events/'); {moment}; }}")
    page.wait_for("source.readyState === 2")
    page.evaluate(AT_ONCE)
    _others_go_on_asking(page)
    assert len(server.requests) <= 1
    assert page.evaluate("states") == states
    assert page.evaluate("source.readyState") == 2


# As polyfills and service workers can do.
DEAF_FETCH = """
    window.fetch = (url) => {
        const headers = { "Content-Type": "text/event-stream" };
        const response = new Response("data: too late\\n\\n", { headers });
        return Promise.resolve(Object.defineProperty(response, "url", { value: url }));
    };
"""


@pytest.mark.parametrize(
    ("close", "states"),
    [
        # The client's own check of the response comes right after this.
        ("queueMicrotask(() => source.close()); listen('/events/')", []),
        ("listen('/events/'); source.addEventListener('open', () => source.close())", ["open 1"]),
    ],
)
def test_close_is_final_even_if_fetch_does_not_heed_it(
    page: Page, serve: Serve, close: str, states: list[str]
) -> None:
    serve(answer(OPEN))
    page.evaluate(f"() => {{ {DEAF_FETCH}; {close}; }}")
    page.wait_for("source.readyState === 2")
    page.evaluate("new Promise((done) => setTimeout(done, 50))")  # nothing is pending any more
    assert [page.evaluate("states"), received(page)] == [states, []]
    assert page.evaluate("source.readyState") == 2
    assert page.console == []


# The interface


def test_interface_is_that_of_an_event_source(page: Page, serve: Serve) -> None:
    serve(answer("data: 1\n\ndata: 2\n\n", hold=True))
    seen = page.evaluate(
        """async () => {
            const log = [];
            const url = "../../events/?x#y";
            const source = new ReconnectingEventSource(url, { eventSourceClass: 1 });
            const initial = ["onopen", "onmessage", "onerror"].map((name) => source[name]);
            const on = (listener, options) => source.addEventListener("message", listener, options);
            const removed = () => log.push("removed");
            const aborted = new AbortController();
            source.onmessage = function ({ data }) {
                log.push(["handler", data, this === source]);
            };
            on({ handleEvent: ({ data }) => log.push(["object", data]) });
            on(() => log.push("once"), { once: true });
            on(removed);
            source.removeEventListener("message", removed);
            on(() => log.push("aborted"), { signal: aborted.signal });
            aborted.abort();
            await new Promise((done) => on(({ data }) => data === "2" && done()));
            source.dispatchEvent(new MessageEvent("message", { data: "own" }));
            const open = [source.readyState, source.CONNECTING, source.OPEN, source.CLOSED];
            source.close();
            const { CONNECTING, OPEN, CLOSED } = ReconnectingEventSource;
            return {
                log, initial, open, url: source.url, withCredentials: source.withCredentials,
                states: [source.readyState, CONNECTING, OPEN, CLOSED],
                isTarget: source instanceof EventTarget,
                error: new EventSourceNotAvailableError() instanceof Error,
            };
        }"""
    )
    origin = page.evaluate("location.origin")
    assert seen == {
        "log": [
            ["handler", "1", True], ["object", "1"], "once",
            ["handler", "2", True], ["object", "2"],
            ["handler", "own", True], ["object", "own"],
        ],
        "initial": [None] * 3,
        "open": [1, 0, 1, 2],
        "states": [2, 0, 1, 2],
        "url": f"{origin}/events/?x#y",
        "withCredentials": False,
        "isTarget": True,
        "error": True,
    }  # fmt: skip


def test_handlers_of_a_subclass_are_called(page: Page, serve: Serve) -> None:
    serve(answer("data: 1\n\n", hold=True))
    page.evaluate(
        """() => {
            class Own extends ReconnectingEventSource {
                onopen() { states.push("open"); }
                onmessage({ data }) { received.push({ data }); }
            }
            new Own("/events/");
        }"""
    )
    page.wait_for("received.length === 1")
    assert page.evaluate("states") == ["open"]


def test_listener_that_throws_is_reported_and_keeps_nothing_from_others(
    page: Page, serve: Serve
) -> None:
    serve(answer("data: 1\n\ndata: 2\n\n", hold=True))
    page.evaluate(
        """() => {
            const source = new ReconnectingEventSource("/events/");
            source.onmessage = ({ data }) => { throw new Error(`handler ${data}`); };
            source.addEventListener("message", () => { throw new Error("listener"); });
            record(source, ["message"]);
        }"""
    )
    page.wait_for("received.length === 2")
    wait_until(lambda: len(page.console) == 4, timeout=10)
    reported = [re.sub(r".*Error: ", "", text) for text in page.console]
    assert reported == ["handler 1", "listener", "handler 2", "listener"]


@both_kinds
def test_module_exports_the_class_by_both_names(page: Page, serve: Serve, kind: str) -> None:
    serve(answer(OPEN, hold=True))
    if kind == "module":
        assert page.evaluate("Default === ReconnectingEventSource")
    assert page.evaluate("ReconnectingEventSource.name") == "ReconnectingEventSource"
    assert page.evaluate("typeof Parser") == "undefined"


def test_url_that_is_none_is_refused_at_once(page: Page, serve: Serve) -> None:
    serve(answer(OPEN))
    with pytest.raises(Exception, match="TypeError"):
        page.evaluate("new ReconnectingEventSource('http://:0:0/')")


@pytest.mark.parametrize("with_credentials", [False, True])
def test_credentials_go_to_other_origins_only_if_asked_for(
    page: Page, serve: Serve, with_credentials: bool
) -> None:
    own = serve(answer(OPEN))
    cors = {"Access-Control-Allow-Origin": own.url, "Access-Control-Allow-Credentials": "true"}
    event = answer("id: a:1\ndata: 1\n\n", headers=cors)
    with ScriptedServer(event, Answer(status=204, headers=cors)) as other:
        page.add_cookie(other.url, "session", "secret")
        page.evaluate(
            "([url, withCredentials]) => listen(url, { withCredentials })",
            [f"{other.url}/events/", with_credentials],
        )
        page.wait_for("source.readyState === 2")
    asked, again = other.requests
    # Without a preflight, also to resume.
    assert [asked.method, again.method, resumed_from(again)] == ["GET", "GET", "a:1"]
    assert asked.headers["Accept"] == "text/event-stream"
    assert asked.headers.get("Cookie") == ("session=secret" if with_credentials else None)
    assert page.evaluate("source.withCredentials") == with_credentials
    assert [event["origin"] for event in received(page)] == [other.url]


def test_headers_of_the_page_are_sent_with_each_request(page: Page, serve: Serve) -> None:
    server = serve(answer("data: 1\n\n"), answer("data: 2\n\n", hold=True))
    page.evaluate("listen('/events/', { headers: { Authorization: 'Bearer x' } })")
    page.wait_for("received.length === 2")
    assert [request.headers["Authorization"] for request in server.requests] == ["Bearer x"] * 2
    assert [request.headers["Cache-Control"] for request in server.requests] == ["no-cache"] * 2


# htmx


def test_events_of_htmx_continue_after_an_error_of_a_proxy(
    page: Page, serve: Serve, node_directory: Path
) -> None:
    """The extension of htmx then starts again, without an id."""
    server = serve(
        answer("id: a:1\ndata: <b>one</b>\n\n"),
        Answer(status=502),
        answer("id: a:2\ndata: <b>two</b>\n\n"),
        answer("id: a:3\ndata: <b>three</b>\n\n", hold=True),
    )
    for script in ("htmx.org/dist/htmx.js", "htmx-ext-sse/dist/sse.js"):
        _run_script(page, (node_directory / "node_modules" / script).read_text(encoding="utf-8"))
    guide = example("docs/how-to/htmx.md", "htmx.createEventSource").code
    (line,) = re.findall(r"^  (htmx\.createEventSource = .*)$", guide, re.MULTILINE)
    _run_script(page, line)
    page.evaluate(
        """() => {
            document.body.innerHTML = `<div hx-ext="sse" sse-connect="/events/?channel=a">
                <p sse-swap="message" hx-swap="beforeend"></p></div>`;
            htmx.process(document.body);
        }"""
    )
    page.wait_for("document.querySelectorAll('p > b').length === 3")
    assert page.evaluate("document.querySelector('p').textContent") == "onetwothree"
    assert [resumed_from(request) for request in server.requests] == [None, "a:1", "a:1", "a:2"]


def _run_script(page: Page, code: str) -> None:
    """Run code like one of the page's scripts, with its variables and functions global."""
    page.evaluate(
        """(code) => {
            const script = document.createElement("script");
            script.textContent = code;
            document.head.append(script);
        }""",
        code,
    )


# The format


EVERYTHING = (
    "\ufeffdata: after a BOM\n\n"
    ": a comment\r\rdata:no blank\r\ndata:  two blanks\rdata:\r\n\r\n"
    "event: a\nid: 1\ndata: ü🎉日本\n\n"
    "event: b\ndata\n\nevent: b\n\ndata: of the type message\n\n"
    "id: with NUL \0\ndata: keeps its id\n\nid\ndata: no id\n\n"
    "id: 2\n\ndata: with that id\n\nretry: 1x\nretry: 7\nunknown: x\nDATA: x\n data: x\n"
    "data: a: b\ndata:\ndata:\n\ndata\n\n\ufeffdata: not at the start\n\n"
    "data: incomplete\nid: 3\n"
)


def native_events(page: Page, url: str, source_class: str) -> list[Any]:
    """The events that a class reads from a stream that ends."""
    events: list[Any] = page.evaluate(
        """([url, name]) => new Promise((done) => {
            const source = new globalThis[name](url);
            const events = [];
            for (const type of ["message", "a", "b"]) {
                source.addEventListener(type, ({ type, data, lastEventId, origin }) =>
                    events.push([type, data, lastEventId, origin]));
            }
            source.onerror = () => { source.close(); done(events); };
        })""",
        [url, source_class],
    )
    return events


def random_stream(seed: int) -> str:
    choose = random.Random(seed)
    tokens = ["data", "event", "id", "retry", ":", ": ", " ", "\n", "\r", "\r\n", "\n\n", "a", "b",
              "1", "\0", "ü", "🎉", "\ufeff", "data: x", "event: a", "id: 7", "\u2028"]  # fmt: skip
    return "".join(choose.choices(tokens, k=120)) + choose.choice(["", "\n\n", "\r"])


def test_streams_are_understood_as_the_browser_understands_them(page: Page, serve: Serve) -> None:
    server = serve(answer(""))
    for text in [EVERYTHING, *map(random_stream, range(60))]:
        encoded = text.encode()
        at = sorted(random.Random(len(encoded)).choices(range(len(encoded)), k=5))
        parts = [encoded[a:b] for a, b in zip([0, *at], [*at, len(encoded)], strict=True)]
        server.answers = [Answer(parts)]
        ours, native = (
            native_events(page, "/events/", name)
            for name in ("ReconnectingEventSource", "EventSource")
        )
        assert ours == native, text
    assert len(server.requests) == 122


def test_it_does_not_matter_where_a_stream_is_cut_into_pieces(page: Page, serve: Serve) -> None:
    serve(answer(EVERYTHING))
    whole = native_events(page, "/events/", "EventSource")
    assert len(whole) == 10
    # Pieces of a real connection can be joined on their way; these arrive unchanged.
    page.evaluate(
        """() => {
            window.fetch = async (url) => {
                const body = new ReadableStream({
                    start(controller) {
                        for (const piece of window.pieces) controller.enqueue(piece);
                        controller.close();
                    },
                });
                const headers = { "Content-Type": "text/event-stream; charset=utf-8" };
                const response = new Response(body, { headers });
                return Object.defineProperty(response, "url", { value: url });
            };
            window.cut = (text, at) => {
                const bytes = new TextEncoder().encode(text);
                window.pieces = at === null
                    ? Array.from(bytes, (byte) => Uint8Array.of(byte))
                    : [bytes.slice(0, at), bytes.slice(at)];
            };
        }"""
    )
    for at in [None, *range(len(EVERYTHING.encode()))]:
        page.evaluate("([text, at]) => cut(text, at)", [EVERYTHING, at])
        assert native_events(page, "/events/", "ReconnectingEventSource") == whole, at
