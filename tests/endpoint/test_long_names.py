"""What opens resumes and goes on, however long the names of its channels are; or it is refused."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import pytest
from django.test import override_settings

from pg_eventstream import get_current_event_id, get_events, send_event, sse
from pg_eventstream.channelmanager import DefaultChannelManager
from pg_eventstream.grip import hold
from pg_eventstream.servers.processes import HOST, Process, accepts, free_port
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.environment import DIRECTORY, child_environment
from tests.support.origin import Answer, Origin, behind_a_proxy
from tests.support.publisher import PublisherProcess
from tests.support.rounds import sequence
from tests.support.sse_client import SSEClient

SHAPES = {
    "short": "x",
    "letters": "abcdefghijklmnopqrstuvwxyz0123456789-",
    "one letter": "a",
    "Japanese": "".join(map(chr, range(0x4E00, 0x9000))),
    "emoji": "".join(map(chr, range(0x1F300, 0x1F5FF))),
    "percent": "%",
    "commas": ",:; /",
}


def names(shape: str, run: str, count: int = 19, length: int = 255) -> list[str]:
    """Channels that nothing shortens, of the longest names that there can be."""
    length = 10 if shape == "short" else length
    choose = random.Random(shape)
    tail = length - len(run) - 3
    return [f"{run}{n:02} " + "".join(choose.choices(SHAPES[shape], k=tail)) for n in range(count)]


class ByShape(DefaultChannelManager):
    """Names channels as a URLconf could: the header X-Names says the shape, and so on."""

    def get_channels_for_request(self, request: Any, view_kwargs: Any) -> Any:
        if "X-Names" not in request.headers:
            return super().get_channels_for_request(request, view_kwargs)
        shape, run, length = request.headers["X-Names"].split(",")
        return names(shape, run, length=int(length))


SETTINGS = {
    "EVENTSTREAM_CHANNEL_LIMIT": 19,
    "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.endpoint.test_long_names.ByShape",
}


@pytest.fixture(autouse=True)
def settings_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PG_EVENTSTREAM_TEST_SETTINGS", json.dumps(SETTINGS))
    with override_settings(**SETTINGS):
        yield


# Names in ids and headers


def test_no_two_channels_have_the_same_name_in_an_id() -> None:
    long = "x" * 65
    digest = sse.quote_channel(long)
    alike = [long, f"{long}y", digest, digest.replace("%7E", "~"), digest.upper(), "~", "%7E"]
    assert len({sse.quote_channel(name) for name in alike}) == len(alike)
    for name in alike:
        assert sse.parse_id(sse.make_id({name: 7}), [*alike, "other"]) == {name: 7}


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_short_and_lead_back_to_their_channels(shape: str) -> None:
    for length in (40, 64, 65, 255):
        channels = names(shape, "run", length=length)
        event_id = sse.make_id(dict.fromkeys(channels, 10**18 - 1))
        assert len(event_id) <= 19 * (64 + 20)
        assert sse.parse_id(event_id, channels) == dict.fromkeys(channels, 10**18 - 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_with_names_in_full_are_resumed_from_as_ever(database: Database, shape: str) -> None:
    channels = names(shape, "run", 3)
    for text in ("1", "2"):
        for channel in channels:
            send_event(channel, "message", text)
    sequence(database)
    in_full = ",".join(f"{quote(channel)}:1" for channel in channels)
    now = get_current_event_id(channels)
    page = get_events(channels, in_full)
    assert ([e.json() for e in page.events], page.reset) == (["2"] * 3, [])
    assert page.last_event_id == now
    assert get_events(channels, page.events[0].id).events == page.events[1:]


@behind_a_proxy
def test_streams_that_were_held_by_names_in_full_go_on(database: Database) -> None:
    channels = names("letters", "run", 3)
    link = f"/events/{hold.NEXT}{hold.sign(hold.Session(tuple(channels), 'anonymous'))}"
    last = ", ".join(f"events-{quote(channel)}; last-id=0" for channel in channels)
    answer = Origin().ask(link, {"Grip-Last": last})
    assert answer.held
    assert Origin().follow(answer).held


# What is refused


def refusal(answer: Answer) -> str:
    [error] = answer.all
    data = json.loads(error.data)
    assert (error.id, data["condition"]) == ("error", "bad-request")
    return str(data["text"])


@behind_a_proxy
def test_link_that_is_too_long_for_a_request_line_is_refused_at_opening(
    database: Database,
) -> None:
    origin, held = Origin(), []
    for length in range(20, 255, 5):
        answer = origin.ask("/events/", {"X-Names": f"letters,run,{length}"})
        held.append(answer.held)
        if answer.held:
            # Also when it has the ids of all channels, each as long as it can be.
            channels = tuple(sorted(names("letters", "run", length=length)))
            ids = {c: random.Random(c).randrange(10**17, 10**18) for c in channels}
            token = hold.sign(hold.Session(channels, "anonymous", ids))
            assert len(f"GET /events/{hold.NEXT}{token} HTTP/1.1\r\n") <= 4094
            head = sum(len(f"{name}: {value}\r\n") for name, value in answer.response.items())
            assert head < 8192
        else:
            assert "too long together" in refusal(answer)
    assert held == sorted(held, reverse=True)
    assert held[0]
    assert not held[-1]


@behind_a_proxy
def test_request_without_room_for_an_id_is_refused_at_opening_and_never_later(
    database: Database,
) -> None:
    origin = Origin()
    channels = [f"c{n}" for n in range(19)]

    def ask(filler: int, **query: list[str]) -> Answer:
        address = "/events/?" + "&".join(f"channel={channel}" for channel in channels)
        given = "".join(f"&lastEventId={quote(value)}" for value in query.get("last", []))
        return origin.ask(address + given, {"Cookie": "x" * filler, **headers})

    headers: dict[str, str] = {}
    most = next(size for size in range(8192, 0, -1) if ask(size).held)
    assert 6000 < most < 8000
    assert "too long to be resumed" in refusal(ask(most + 1))
    last = sse.make_id(dict.fromkeys(channels, 10**18 - 1))
    assert ask(most, last=[last]).held
    headers = {"Last-Event-ID": f"c9:{10**18 - 1},{last}"}
    resumed = ask(most)
    assert resumed.held


# With real servers

ORIGINS = {
    "uvicorn": "uvicorn tests.project.asgi:application --port={port} --log-level=warning",
    "gunicorn": "gunicorn tests.project.wsgi --bind=127.0.0.1:{port} --threads=8",
}
DIRECT = {
    "uvicorn": "uvicorn tests.project.asgi:application --log-level=warning --port={port}",
    "uvicorn with h11": "uvicorn tests.project.asgi:application --http=h11 --port={port}",
    "daphne": "daphne tests.project.asgi:application --port={port}",
    "hypercorn": "hypercorn tests.project.asgi:application --bind=127.0.0.1:{port}",
    "granian": "granian tests.project.asgi:application --interface=asgi --port={port}",
    "gunicorn": "gunicorn tests.project.asgi:application"
    " --worker-class=uvicorn_worker.UvicornWorker --bind=127.0.0.1:{port}",
}


@pytest.fixture
def serve(database: Database) -> Iterator[Callable[..., int]]:
    with ExitStack() as stack:

        def start(command: str, port: int, environment: dict[str, str]) -> int:
            process = Process(
                command.split()[0],
                [sys.executable, "-m", *command.format(port=port).split()],
                log_path=DIRECTORY / f"long-{database.name}.log",
                environment=environment,
            )
            stack.callback(process.kill)
            process.start(ready=lambda: accepts(port))
            return port

        yield start


def resumes_or_is_refused(url: str, channel: str, shape: str, by: str) -> str:
    """What became of it: of a stream, then of the one that resumes, and its next link."""
    run = f"{channel}{shape[:1]}{by[:1]}"
    channels = names(shape, run)
    asked = channels if by == "query" else []
    headers = {} if by == "query" else {"X-Names": f"{shape},{run},255"}
    with SSEClient(url, asked, headers=headers) as first:
        first.wait_for(lambda: bool(first.control) or first.ended.is_set(), 30)
        if not first.control:
            return f"did not open ({first.statuses})"
        if first.control[0].type == "stream-error":
            error = json.loads(first.control[0].data)
            assert error["condition"] == "bad-request"
            assert "too long" in error["text"]
            return "refused"
        send_event(channels[7], "message", "live")
        last = first.wait_count(1)[-1].id
    send_event(channels[3], "message", "missed")
    with SSEClient(url, asked, last, headers=headers) as second:
        second.wait_count(1)
        send_event(channels[18], "message", "x" * 500_000)  # is fetched by the next link
        send_event(channels[0], "message", "last")
        got = [json.loads(event.data)[:6] for event in second.wait_count(3)]
        assert got == ["missed", "xxxxxx", "last"]
        assert [event.type for event in second.control] == ["stream-open"]
        assert second.connections == 1
    return "resumed"


def table(url: str, channel: str, shapes: list[str]) -> dict[tuple[str, str], str]:
    return {
        (shape, by): resumes_or_is_refused(url, channel, shape, by)
        for shape in shapes
        for by in ("address", "query")
    }


some = pytest.param(["Japanese", "percent"], id="some")
every = pytest.param([*SHAPES], id="all", marks=[pytest.mark.faults, pytest.mark.thorough])
#: Short addresses of channels with these names are refused behind a proxy: their links cannot be
#: made shorter.
TOO_LONG = {"letters", "Japanese", "emoji"}


@pytest.mark.parametrize("shapes", [some, every])
@pytest.mark.parametrize("server", ORIGINS)
def test_behind_the_proxy_what_opens_resumes_and_goes_on(
    database: Database,
    serve: Callable[..., int],
    pushpin: Pushpin,
    app_port: int,
    publisher: PublisherProcess,
    channel: str,
    server: str,
    shapes: list[str],
) -> None:
    serve(ORIGINS[server], app_port, child_environment(pushpin))
    found = table(f"{pushpin.url}/events/", channel, shapes)
    by_address = {shape: found[shape, "address"] for shape in shapes}
    assert by_address == {shape: "refused" if shape in TOO_LONG else "resumed" for shape in shapes}
    # What the servers do not even pass on does not open.
    assert {f.partition(" (")[0] for f in found.values()} <= {"refused", "resumed", "did not open"}


@pytest.mark.parametrize("shapes", [some, every])
@pytest.mark.parametrize("server", DIRECT)
def test_without_a_proxy_what_opens_resumes(
    database: Database,
    serve: Callable[..., int],
    channel: str,
    server: str,
    shapes: list[str],
) -> None:
    port = serve(DIRECT[server], free_port(), child_environment())
    found = table(f"http://{HOST}:{port}/events/", channel, shapes)
    assert {found[shape, "address"] for shape in shapes} == {"resumed"}
    assert {f.partition(" (")[0] for f in found.values()} <= {"refused", "resumed", "did not open"}
