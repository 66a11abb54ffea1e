"""A stream that opens also resumes, with channel names of any length and with every server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from pg_eventstream import send_event
from pg_eventstream.servers.processes import HOST, accepts, free_port
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.environment import DIRECTORY, child_environment, settings_everywhere
from tests.support.forked import ForkedProcess
from tests.support.long_names import SETTINGS, SHAPES, names
from tests.support.publisher import PublisherProcess
from tests.support.sse_client import SSEClient


@pytest.fixture(autouse=True)
def settings_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with settings_everywhere(monkeypatch, **SETTINGS):
        yield


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
            process = ForkedProcess(
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
    """The outcome for a stream, then for the one that resumes, and its next link."""
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
        send_event(channels[18], "message", "x" * 500_000)  # the next link delivers it
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
SELDOM = (pytest.mark.faults, pytest.mark.thorough)
every = pytest.param([*SHAPES], id="all", marks=SELDOM)
#: Behind a proxy, short URLs of channels with these names are refused: their links cannot be made
#: shorter.
TOO_LONG = {"letters", "Japanese", "emoji"}


@pytest.mark.parametrize("shapes", [some, every])
@pytest.mark.parametrize("server", ORIGINS)
def test_stream_that_opens_behind_the_proxy_resumes_and_continues(
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
    # A request that the servers do not even forward opens nothing.
    assert {f.partition(" (")[0] for f in found.values()} <= {"refused", "resumed", "did not open"}


@pytest.mark.parametrize("shapes", [some, every])
@pytest.mark.parametrize(
    "server",
    [
        pytest.param(server, marks=() if server in ("uvicorn", "daphne") else SELDOM)
        for server in DIRECT
    ],
)
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
