"""Streams without a proxy, under common servers and for common clients."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import django.db
import httpx
import pytest
import uvicorn
from httpx_sse import connect_sse

from pg_eventstream import send_event, send_events
from pg_eventstream.servers.processes import HOST, Process, accepts, free_port, wait_until
from tests.project import settings as tests_settings
from tests.project.asgi import application
from tests.support.browser import Browser
from tests.support.database import Database
from tests.support.environment import DIRECTORY, child_environment
from tests.support.forked import ForkedProcess
from tests.support.load import Load
from tests.support.origin import log_in
from tests.support.sse_client import SSEClient

# Each serves the test project at a port.
SERVERS = {
    "uvicorn": "uvicorn tests.project.asgi:application --log-level=warning --port={port}",
    "uvicorn with workers": "uvicorn tests.project.asgi:application --workers=2 --port={port}",
    "gunicorn asgi": (
        "gunicorn tests.project.asgi:application --worker-class=asgi --workers=2"
        " --bind=127.0.0.1:{port}"
    ),
    "daphne": "daphne tests.project.asgi:application --port={port}",
    "hypercorn": "hypercorn tests.project.asgi:application --bind=127.0.0.1:{port}",
    "granian": "granian tests.project.asgi:application --interface=asgi --port={port}",
    "gunicorn": (
        "gunicorn tests.project.asgi:application --worker-class=uvicorn_worker.UvicornWorker"
        " --workers=2 --bind=127.0.0.1:{port}"
    ),
    "runserver": "django runserver 127.0.0.1:{port}",
}


SELDOM = (pytest.mark.faults, pytest.mark.thorough)


class Server(ForkedProcess):
    """A server, which keeps its port when it is restarted."""

    def __init__(
        self, kind: str, database: Database, options: tuple[str, ...] = (), **settings: Any
    ) -> None:
        self.port = free_port()
        self.address = f"http://{HOST}:{self.port}"
        self.url = f"{self.address}/events/"
        super().__init__(
            kind,
            [sys.executable, "-m", *SERVERS[kind].format(port=self.port).split(), *options],
            log_path=DIRECTORY / f"{kind.replace(' ', '-')}-{database.name}-{self.port}.log",
            environment=child_environment(PG_EVENTSTREAM_TEST_SETTINGS=json.dumps(settings)),
        )

    def begin(self) -> Server:
        self.start(ready=lambda: accepts(self.port))
        return self


Serve = Callable[..., Server]


@pytest.fixture
def serve(database: Database) -> Iterator[Serve]:
    """Starts servers, and ends them with the test."""
    with ExitStack() as stack:

        def start(kind: str = "uvicorn", options: tuple[str, ...] = (), **settings: Any) -> Server:
            server = Server(kind, database, options, **settings)
            stack.callback(server.kill)
            return server.begin()

        yield start


class Client(SSEClient):
    """Knows which of its streams were ended by the server, and which broke off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ends: list[str] = []

    def _parse(self, response: http.client.HTTPResponse) -> None:
        try:
            super()._parse(response)
        except (OSError, http.client.HTTPException) as e:
            self.ends.append(repr(e))
            raise
        else:
            self.ends.append("clean")
        finally:
            response.close()


def texts(client: SSEClient) -> list[str]:
    return [event.data for event in client.events]


# Servers

AT_ONCE = 8.0
"""Seconds. Servers take up to 0.8 on an idle machine; one that waited for streams would not end."""


def tell(server: Server, number: signal.Signals) -> None:
    """Stop it: SIGTERM as service managers do, SIGINT to all processes as a terminal does."""
    if number is signal.SIGINT:
        os.killpg(server.pid, number)
    else:
        os.kill(server.pid, number)


@pytest.mark.parametrize(
    "kind",
    [
        *("uvicorn", "daphne", "granian"),
        *(
            pytest.param(kind, marks=SELDOM)
            for kind in ("gunicorn", "uvicorn with workers", "hypercorn", "gunicorn asgi")
        ),
    ],
)
def test_server_that_is_stopped_ends_at_once_and_its_clients_continue_at_the_next(
    database: Database, serve: Serve, kind: str, channel: str
) -> None:
    server = serve(kind)
    load = Load(database, channel, senders=2, pause=0.02)
    with ExitStack() as stack:
        clients = [Client(server.url, [channel], reconnect=True) for _ in range(5)]
        for client in clients:
            stack.enter_context(client)
        for client in clients:
            client.wait_open()
        with load.running():
            for number in (signal.SIGTERM, signal.SIGINT):
                for client in clients:
                    client.wait_count(len(client.events) + 3)  # live ones
                    client.ends.clear()
                began = time.monotonic()
                tell(server, number)
                server.wait(timeout=20)
                server.kill()  # all its processes
                assert time.monotonic() - began < AT_ONCE
                for client in clients:
                    client.wait_for(lambda client=client: bool(client.ends))  # type: ignore[misc]
                    assert client.ends[0] == "clean"
                server.begin()
        for client in clients:
            load.check(client)


def workers(server: Server) -> set[int]:
    """The processes that serve requests: the server's own if it has no others."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    helper = b"resource_tracker"  # a process of Python's multiprocessing
    return {
        int(pid) for pid in children if helper not in Path(f"/proc/{pid}/cmdline").read_bytes()
    } or {server.pid}


def reach_limit(server: Server) -> None:
    """Send one more request."""
    with suppress(OSError, http.client.HTTPException):
        link = http.client.HTTPConnection(HOST, server.port, timeout=5)
        with closing(link):
            link.request("GET", "/nothing/")
            link.getresponse().read()


def hang_up(server: Server) -> None:
    """Send one SIGHUP for new workers, as an administrator does."""
    if not getattr(server, "was_hung_up", False):
        server.was_hung_up = True  # type: ignore[attr-defined]
        os.kill(server.pid, signal.SIGHUP)


def by_limit(kind: str, option: str, *marks: pytest.MarkDecorator) -> Any:
    options = (f"--{option}=20",)
    return pytest.param(kind, options, reach_limit, id=f"{kind} {option}", marks=marks)


def by_hanging_up(kind: str, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(kind, (), hang_up, id=f"{kind} SIGHUP", marks=marks)


@pytest.mark.parametrize(
    ("kind", "options", "make_it_end"),
    [
        by_limit("uvicorn", "limit-max-requests"),
        by_limit("uvicorn with workers", "limit-max-requests", *SELDOM),
        by_limit("gunicorn", "max-requests", *SELDOM),
        by_limit("gunicorn asgi", "max-requests", *SELDOM),
        by_limit("hypercorn", "max-requests", *SELDOM),
        by_hanging_up("uvicorn with workers", *SELDOM),
        by_hanging_up("gunicorn", *SELDOM),
        by_hanging_up("gunicorn asgi", *SELDOM),
        by_hanging_up("hypercorn", *SELDOM),
        by_hanging_up("granian"),
    ],
)
def test_server_that_ends_or_replaces_its_workers_ends_their_streams(
    database: Database,
    serve: Serve,
    kind: str,
    options: tuple[str, ...],
    make_it_end: Callable[[Server], None],
    channel: str,
) -> None:
    server = serve(kind, options)
    load = Load(database, channel, senders=2, pause=0.02)
    with ExitStack() as stack:
        clients = [Client(server.url, [channel], reconnect=True) for _ in range(5)]
        for client in clients:
            stack.enter_context(client)
        for client in clients:
            client.wait_open()
        old = workers(server)
        with load.running():

            def all_ended() -> bool:
                make_it_end(server)
                # Uvicorn's supervisor can need 5 s to notice that a worker has ended.
                return all(client.ends for client in clients) and not any(
                    Path(f"/proc/{pid}/exe").exists() for pid in old
                )

            wait_until(all_ended, timeout=30)
            assert [client.ends[0] for client in clients] == ["clean"] * 5
            if old == {server.pid}:  # no process starts it again
                server.wait(timeout=20)
                server.kill()
                server.begin()
        for client in clients:
            load.check(client)


def test_server_in_a_thread_ends_its_streams_and_may_begin_again(
    database: Database, channel: str
) -> None:
    port = free_port()
    client = Client(f"http://{HOST}:{port}/events/", [channel], reconnect=True)
    with client:
        for count in (1, 2):
            server = uvicorn.Server(uvicorn.Config(application, port=port, log_level="error"))
            thread = threading.Thread(target=server.run)
            thread.start()
            try:
                client.wait_for(lambda count=count: client.connections >= count)  # type: ignore[misc]
                send_event(channel, "message", count)
                client.wait_count(count)
            finally:
                server.should_exit = True
                thread.join(10)
            assert not thread.is_alive()
            assert client.ends == ["clean"] * count
    assert texts(client) == ["1", "2"]


def test_server_at_a_unix_socket_ends_its_streams(
    database: Database, tmp_path: Path, channel: str
) -> None:
    path = tmp_path / "socket"
    server = Process(
        "uvicorn at a Unix socket",
        [sys.executable, "-m", "uvicorn", "tests.project.asgi:application", f"--uds={path}",
         "--limit-max-requests=1"],
        log_path=DIRECTORY / f"unix-{database.name}.log",
        environment=child_environment(),
    )  # fmt: skip

    def ask(target: str) -> http.client.HTTPResponse:
        link = http.client.HTTPConnection("localhost")
        link.sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        link.sock.settimeout(20)
        link.sock.connect(str(path))
        link.request("GET", target)
        return stack.enter_context(link.getresponse())

    with ExitStack() as stack:
        stack.callback(server.kill)
        server.start(ready=path.exists)
        stream = ask(f"/events/?channel={channel}")
        while stream.readline() != b"event: stream-open\n":
            pass
        ask("/nothing/").read()  # streams count when they are over
        assert stream.read().endswith(b"\n\n")  # to its end
        server.wait(timeout=10)


@pytest.mark.faults
@pytest.mark.thorough
def test_runserver_with_daphne_reloads_at_once_though_streams_are_open(
    database: Database, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channel: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = tmp_path / "urls_of_a_project.py"

    def write(version: int) -> None:
        code.write_text(
            "from django.http import HttpResponse\n"
            "from django.urls import path\n"
            "from tests.project.urls import urlpatterns as events\n"
            f"urlpatterns = [*events, path('version/', lambda request: HttpResponse({version}))]\n"
        )

    write(1)
    server = serve(
        "runserver",
        INSTALLED_APPS=["daphne", *tests_settings.INSTALLED_APPS],
        ASGI_APPLICATION="tests.project.asgi.application",
        ROOT_URLCONF=code.stem,
    )

    def version() -> bytes:
        try:
            with urllib.request.urlopen(f"{server.address}/version/", timeout=5) as response:
                return bytes(response.read())
        except OSError:
            return b""

    with ExitStack() as stack:
        clients = [Client(server.url, [channel], reconnect=True) for _ in range(5)]
        for client in clients:
            stack.enter_context(client)
        for client in clients:
            client.wait_open()
        send_event(channel, "message", 1)
        for client in clients:
            client.wait_count(1)
        assert version() == b"1"
        write(2)

        def reloaded() -> bool:
            # It looks once a second. At its first look it assumes that nothing has changed.
            os.utime(code)
            return version() == b"2"

        wait_until(reloaded, timeout=10, check=2)
        send_event(channel, "message", 2)
        for client in clients:
            client.wait_count(2)
            assert texts(client) == ["1", "2"]


def test_runserver_without_asgi_says_what_to_do(database: Database, serve: Serve) -> None:
    server = serve("runserver")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.url}?channel=a", timeout=20)
    with refused.value as answer:
        assert answer.code == 501
        said = answer.read().decode()
    assert "this endpoint streams under ASGI only" in said
    assert 'add "daphne"' in said


# The cost and the length of streams


def test_open_streams_hold_neither_connections_nor_threads(
    database: Database, serve: Serve, channel: str
) -> None:
    server = serve()
    _, cookie = log_in("ann")

    def connections_of_server() -> int:
        django.db.connections.close_all()  # those of this process
        return int(
            database.value(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )

    def threads() -> int:
        status = Path(f"/proc/{server.pid}/status").read_text()
        return int(status.partition("\nThreads:")[2].split()[0])

    with ExitStack() as stack:

        def open_streams(count: int) -> list[SSEClient]:
            clients = [
                # The database is asked for their users.
                stack.enter_context(SSEClient(server.url, [channel], headers={"Cookie": cookie}))
                for _ in range(count)
            ]
            for client in clients:
                client.wait_open()
            return clients

        clients = open_streams(1)
        wait_until(lambda: connections_of_server() == 1, timeout=20)  # that of the hub
        threads_of_one = threads()
        clients += open_streams(49)
        send_event(channel, "message", "to all")
        for client in clients:
            client.wait_count(1)
        # And one for each of the reading threads, which all streams share.
        wait_until(lambda: connections_of_server() <= 1 + 4, timeout=20)
        assert threads() <= threads_of_one + 4


def test_stream_that_has_reached_its_age_ends_and_nothing_is_lost(
    database: Database, serve: Serve, channel: str
) -> None:
    server = serve(EVENTSTREAM_MAX_AGE=0.4)
    load = Load(database, channel, senders=2)
    client = Client(server.url, [channel], reconnect=True)
    with client:
        client.wait_open()
        with load.running():
            client.wait_for(lambda: client.connections >= 4)
        load.check(client)
        assert set(client.ends) == {"clean"}


def memory(server: Server) -> int:
    """The memory of its largest process, in kB."""
    sizes = [
        re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        for pid in {server.pid, *workers(server)}
    ]
    return max(int(size) for (size,) in sizes)


# All but Daphne wait for clients to read; Daphne keeps what they have not read.
@pytest.mark.parametrize(
    "kind",
    [
        "daphne",
        *(
            pytest.param(kind, marks=SELDOM)
            for kind in ("uvicorn", "hypercorn", "granian", "gunicorn asgi")
        ),
    ],
)
@pytest.mark.parametrize("start", ["earliest", pytest.param("", marks=SELDOM)])
def test_client_that_reads_nothing_costs_little_memory_and_one_that_reads_gets_all(
    database: Database, serve: Serve, kind: str, start: str, channel: str
) -> None:
    server = serve(kind)
    sent = [f"{n} {'x' * 500_000}" for n in range(200)]

    def send() -> None:
        for n in range(0, len(sent), 10):
            send_events([(channel, "message", text, None, False) for text in sent[n : n + 10]])

    # It does not reconnect, because it must not be ended.
    reader = SSEClient(server.url, [channel], last_event_id=start)
    if start:
        send()
    with reader, socket.create_connection((HOST, server.port)) as idle:
        reader.wait_open()
        query = f"channel={channel}&lastEventId={start}"
        idle.sendall(f"GET /events/?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        got = bytearray()
        while b"stream-open" not in got:
            got += idle.recv(1000)
        before = memory(server)
        if not start:
            send()
        reader.wait_count(len(sent), timeout=25)
        assert [event.data for event in reader.events] == sent
        # The other stream would have arrived by now, too.
        assert memory(server) < before + 60_000
        idle.settimeout(60)
        end, all_sent = b"\r\n0\r\n\r\n", f"\nid: {channel}:{len(sent)}\n".encode()
        while end not in got[-10:] and all_sent not in got[-1_100_000:]:
            piece = idle.recv(1_000_000)
            assert piece, "neither all nor an end in order"
            got += piece
    last = re.findall(rb"\nid: (\S+)\n", got)[-1].decode()
    with SSEClient(server.url, [channel], last_event_id=last) as again:
        count = int(last.rpartition(":")[2])
        again.wait_open().wait_count(len(sent) - count, timeout=25)
        assert [event.data for event in again.events] == sent[count:]


# Clients

GZIP = {"MIDDLEWARE": ["django.middleware.gzip.GZipMiddleware", *tests_settings.MIDDLEWARE]}


def test_gzip_middleware_holds_no_event_back(
    database: Database, serve: Serve, channel: str
) -> None:
    """It would compress each piece separately, and browsers show only the first one."""
    url = serve(**GZIP).url
    with SSEClient(url, [channel], headers={"Accept-Encoding": "gzip"}) as client:
        client.wait_open(
            timeout=10
        )  # less than the interval of keep-alives, which could push them out
        for count in range(1, 6):
            send_event(channel, "message", count)
            client.wait_count(count, timeout=10)
        assert texts(client) == ["1", "2", "3", "4", "5"]


class PythonClient:
    """httpx-sse in a thread. Its user has to reconnect with the last id."""

    def __init__(self, url: str) -> None:
        self.received: list[str] = []
        self._url = url
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PythonClient:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Call it when the server has ended."""
        self._closed = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        headers: dict[str, str] = {}
        with httpx.Client(timeout=None) as client:
            while not self._closed:
                with (
                    suppress(httpx.TransportError),
                    connect_sse(client, "GET", self._url, headers=headers) as source,
                ):
                    for event in source.iter_sse():
                        headers["Last-Event-ID"] = event.id
                        if event.event == "message":
                            self.received.append(event.data)
                time.sleep(0.1)


@pytest.mark.faults
@pytest.mark.thorough
def test_every_kind_of_client_resumes_at_a_server_that_was_killed(
    database: Database, serve: Serve, browser: Browser, node_directory: Path, channel: str
) -> None:
    """Native EventSource, the browser client, npm's eventsource and PyPI's httpx-sse."""
    with ExitStack() as stack:
        servers = [serve(ROOT_URLCONF="tests.support.pages.urls", **more) for more in ({}, GZIP)]
        path = f"/events/?channel={channel}&lastEventId=earliest"
        received: dict[str, Callable[[], list[str]]] = {}

        node = Process(
            "node",
            ["node", node_directory / "stream.js", *(server.address + path for server in servers)],
            log_path=DIRECTORY / f"node-{database.name}.log",
        )
        stack.callback(node.kill)
        node.start()

        def of_node(number: int) -> list[str]:
            assert node.running, node.error("has ended")
            assert node.log_path
            lines = [json.loads(line) for line in node.log_path.read_text().splitlines()]
            return [data for its_number, _, data in lines if its_number == number]

        for number, server in enumerate(servers):
            page = browser.new_page()
            stack.callback(page.close)
            page.goto(f"{server.address}/pages/module/")
            page.evaluate(
                """(path) => {
                  window.received = { EventSource: [], ReconnectingEventSource: [] };
                  window.sources = Object.keys(received).map((name) => {
                    const source = new window[name](path);
                    source.onmessage = ({ data }) => received[name].push(data);
                    return source;
                  });
                }""",
                path,
            )
            for name in ("EventSource", "ReconnectingEventSource"):
                received[f"{name} {number}"] = partial(page.evaluate, f"received.{name}")
            received[f"node {number}"] = partial(of_node, number)
            python = stack.enter_context(PythonClient(server.address + path))
            received[f"python {number}"] = partial(list, python.received)
            stack.callback(server.kill)

        sent: list[str] = []

        def send() -> None:
            for _ in range(5):
                sent.append(str(len(sent)))
                send_event(channel, "message", sent[-1], json_encode=False)

        def all_have_all() -> None:
            for name, of_client in received.items():
                try:
                    wait_until(lambda of=of_client: len(of()) >= len(sent), timeout=30)  # type: ignore[misc]
                finally:
                    assert of_client() == sent, name

        send()
        all_have_all()
        for server in servers:
            server.kill()
        send()  # while it is away
        for server in servers:
            server.begin()
        send()
        all_have_all()
        send()
        all_have_all()
