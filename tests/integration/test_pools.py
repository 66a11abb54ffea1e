"""Streams leave Django's connections, pooled or kept between requests, to requests."""

from __future__ import annotations

import json
import logging
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from django.db import connections
from django.test import override_settings

from pg_eventstream import send_event
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.postgres.threads import run
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.servers.processes import accepts, free_port, wait_until
from tests.support.database import Database
from tests.support.environment import DIRECTORY, child_environment
from tests.support.forked import ForkedProcess
from tests.support.http_service import HttpService, body_of, respond
from tests.support.sse_client import SSEClient


@pytest.fixture
def pooled(database: Database) -> Iterator[Callable[..., str]]:
    """Creates database aliases with a pool."""
    made: list[str] = []

    def make(pool: Any = True) -> str:
        alias = f"pool_{database.name}_{len(made)}"
        connections.settings[alias] = {**connections.settings["default"], "OPTIONS": {"pool": pool}}
        made.append(alias)
        return alias

    yield make
    for alias in made:
        connections[alias].close_pool()  # type: ignore[attr-defined]
        del connections[alias]
        del connections.settings[alias]


def session_of(alias: str) -> int:
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


def test_pool_of_the_usual_size_is_there_for_requests_while_streams_read(
    database: Database, pooled: Callable[..., str]
) -> None:
    alias = pooled()
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            run(lambda: session_of(alias))

    with ThreadPoolExecutor(8) as threads:
        reading = [threads.submit(read) for _ in range(8)]
        try:
            for _ in range(5):
                run(lambda: session_of(alias))
            pool = connections[alias].pool  # type: ignore[attr-defined]
            with ExitStack() as stack:
                for _ in range(4):
                    stack.enter_context(pool.connection(timeout=10))
        finally:
            over.set()
        for each in reading:
            each.result()


def test_connections_of_a_pool_that_were_lost_are_replaced(
    database: Database, pooled: Callable[..., str]
) -> None:
    alias = pooled()
    for _ in range(3):
        run(lambda: session_of(alias))
        database.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert run(lambda: session_of(alias))


def test_private_sessions_are_not_from_the_pool(
    database: Database, pooled: Callable[..., str]
) -> None:
    alias = pooled({"min_size": 1, "max_size": 1, "timeout": 5})
    with Connector(alias).connect("one") as one, Connector(alias).connect("two") as two:
        assert one.info.backend_pid != two.info.backend_pid != session_of(alias)


class Proxy(HttpService):
    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body_of(request)
        respond(request, 200)


def test_feeds_of_many_proxies_share_a_pool_that_the_channel_manager_asks(
    database: Database, pooled: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    alias = pooled({"min_size": 1, "max_size": 1, "timeout": 15})
    seen: set[int] = set()

    class Manager:
        def is_channel_reliable(self, channel: str) -> bool:
            seen.add(session_of(alias))
            return True

    caplog.set_level(logging.WARNING, "pg_eventstream")
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy()) for _ in range(3)]
        stack.enter_context(
            override_settings(GRIP_PROXIES=[{"control_uri": proxy.url} for proxy in proxies])
        )
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("pg_eventstream.channels.get_channelmanager", Manager)
        publisher = Publisher(Connector("default"))
        running = threading.Thread(target=publisher.run)
        running.start()
        try:
            for n in range(1, 4):
                send_event("c", "message", n)
                wait_until(
                    lambda n=n: (
                        database.fetch("SELECT DISTINCT position FROM pg_eventstream_proxy")  # type: ignore[misc]
                        == [(n,)]
                    ),
                    timeout=60,
                )
        finally:
            publisher.stop()
            running.join()
    assert "is_channel_reliable" not in caplog.text
    assert len(seen) == 1


@pytest.mark.parametrize(
    "kept",
    [
        {"OPTIONS": {"pool": True}},
        pytest.param(
            {"OPTIONS": {"pool": True}, "CONN_HEALTH_CHECKS": True}, marks=pytest.mark.thorough
        ),
        pytest.param({"CONN_MAX_AGE": None}, marks=pytest.mark.thorough),
        {"CONN_MAX_AGE": 600, "CONN_HEALTH_CHECKS": True},
        pytest.param({"CONN_MAX_AGE": 0}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_ordinary_requests_get_a_connection_despite_many_streams(
    database: Database, channel: str, kept: dict[str, Any]
) -> None:
    settings = {
        "DATABASES": {"default": {**connections.settings["default"], **kept}},
        "ROOT_URLCONF": "tests.project.pool_urls",
        "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channelmanagers.AsksWhatIsReliable",
    }
    port = free_port()
    server = ForkedProcess(
        "the server",
        [sys.executable, "-m", "uvicorn", "tests.project.asgi:application", f"--port={port}"],
        log_path=DIRECTORY / f"pool-{database.name}.log",
        environment=child_environment(PG_EVENTSTREAM_TEST_SETTINGS=json.dumps(settings)),
    )
    url = f"http://127.0.0.1:{port}/"
    database.execute(
        "INSERT INTO app_membership (channel) SELECT %s || n FROM generate_series(1, 9) AS n",
        [channel],
    )
    over = threading.Event()

    def come_and_go(n: int) -> None:
        opened = 0
        while not over.is_set() or opened < 10:
            opened += 1
            with SSEClient(f"{url}events/", [f"{channel}{n}"]) as client:
                client.wait_open(timeout=60)

    def ask(_: int) -> bytes:
        with urllib.request.urlopen(f"{url}ordinary/", timeout=25) as answer:
            return bytes(answer.read())

    with ExitStack() as stack, ThreadPoolExecutor(20) as threads:
        stack.callback(server.kill)
        server.start(ready=lambda: accepts(port))
        stay = [stack.enter_context(SSEClient(f"{url}events/", [f"{channel}9"])) for _ in range(12)]
        for client in stay:
            client.wait_open(timeout=60)
        coming = [threads.submit(come_and_go, n) for n in range(1, 9)]
        try:
            for n in range(3):
                send_event(f"{channel}9", "message", n)
                assert set(threads.map(ask, range(12))) == {b"9"}
        finally:
            over.set()
        for each in coming:
            each.result()
        for client in stay:
            assert [event.data for event in client.wait_count(3)] == ["0", "1", "2"]
        sessions = "FROM pg_stat_activity WHERE datname = current_database()"
        # Django can keep one for each of the 36 ordinary requests. There were 92 streams or more.
        assert database.value(f"SELECT count(*) {sessions}") < 60
