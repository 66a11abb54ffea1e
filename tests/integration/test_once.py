"""A publisher with ``--once`` publishes all events and ends, or says what it could not do."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from io import StringIO
from typing import Any

import psycopg
import pytest
from django.core.management import CommandError, call_command, load_command_class
from django.db import connections
from django.test import override_settings

from pg_eventstream import channel_permission_changed, send_event, send_events
from pg_eventstream.errors import NotLeading
from pg_eventstream.limits import LIMITS, Limits
from pg_eventstream.management.base import DatabaseCommand
from pg_eventstream.postgres import connector as connection_module
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.postgres.locks import LEADER_LOCK, LOCK_SPACE, PRUNE_LOCK
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.servers.processes import accepts, free_port, wait_until
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.environment import DIRECTORY, child_environment
from tests.support.forked import ForkedProcess
from tests.support.http_service import HttpService, body_of
from tests.support.load import Load
from tests.support.network import Network
from tests.support.sse_client import SSEClient

#: No test waits longer, on any machine.
_AT_MOST = 60
LEAD = f"pg_try_advisory_xact_lock_shared({LOCK_SPACE}, {LEADER_LOCK})"


IMPATIENT = Limits(command_patience=1.0, join=0.5)


def with_limits(name: str, limits: Limits) -> DatabaseCommand:
    command = load_command_class("pg_eventstream", name)
    assert isinstance(command, DatabaseCommand)
    command.limits = limits
    return command


def command(name: str, *arguments: str, limits: Limits = LIMITS) -> str:
    """The output of the command, or its error. Fails if it does not end."""
    out = StringIO()
    command = with_limits(name, limits)

    def call() -> str:
        try:
            call_command(command, *arguments, verbosity=0, stdout=out)
        except CommandError as e:
            return f"failed: {e}"
        finally:
            connections.close_all()
        return out.getvalue()

    threads = ThreadPoolExecutor(1)
    try:
        return threads.submit(call).result(_AT_MOST)
    finally:
        threads.shutdown(wait=False)


def once(limits: Limits = LIMITS) -> str:
    return command("eventstream_publisher", "--once", limits=limits)


def send(count: int, channel: str = "a") -> None:
    send_events([(channel, "message", n) for n in range(count)])


def published_ids(control: ControlPort) -> list[str]:
    """The ids of the published events, without hints."""
    return [item["id"] for item in control.items if "id" in item]


# Proxies


class Trickle(HttpService):
    """Its response arrives byte by byte and never ends."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body_of(request)
        request.send_response(200)
        request.end_headers()
        for _ in range(10_000):
            request.wfile.write(b".")
            time.sleep(0.1)


@contextmanager
def down() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def silent() -> Iterator[str]:
    with ControlPort() as port:
        port.silent.set()
        yield port.url


@contextmanager
def never_accepts() -> Iterator[str]:
    with closing(socket.create_server(("127.0.0.1", 0), backlog=0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def trickles() -> Iterator[str]:
    with Trickle() as service:
        yield service.url


def answers(status: int) -> Callable[[], Any]:
    @contextmanager
    def proxy() -> Iterator[str]:
        with ControlPort() as port:
            port.answers = [status] * 100_000
            yield port.url

    return proxy


RARER = [pytest.mark.thorough, pytest.mark.faults]
TAKES_NOTHING = {
    "down": (down, "cannot be reached", "3 events wait"),
    "silent": (silent, "", "3 events wait"),
    "never accepts": (never_accepts, "", "3 events wait"),
    "trickles": (trickles, "", "3 events wait"),
    "503": (answers(503), "answered 503", "3 events wait"),
    "404": (answers(404), "check the path in GRIP_URL", "3 events wait"),
    "401": (answers(401), "check iss and key in GRIP_URL", "3 events wait"),
    # Events that it refuses are not repeated: clients get them when they reconnect.
    "400": (answers(400), "answered 400", "refused 3 events"),
}


@pytest.mark.parametrize(
    ("proxy", "why", "how_many"),
    [
        pytest.param(*case, id=name, marks=RARER if name in ("never accepts", "404", "401") else [])
        for name, case in TAKES_NOTHING.items()
    ],
)
def test_proxy_that_takes_nothing_is_named_and_delays_no_other(
    database: Database,
    control: ControlPort,
    proxy: Callable[[], Any],
    why: str,
    how_many: str,
) -> None:
    send(3)
    with proxy() as url:
        proxies = [{"control_uri": url}, {"control_uri": control.url}]
        with override_settings(GRIP_URL=None, GRIP_PROXIES=proxies):
            said = once(IMPATIENT)
    assert said.startswith("failed: "), said
    (line,) = (line for line in said.splitlines() if url in line)
    assert why in line
    assert how_many in line
    assert f"3 events published to {control.url}." in said
    assert published_ids(control) == ["1", "2", "3"]
    assert database.value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


def test_what_waits_is_published_once_the_proxy_is_back(
    database: Database, control: ControlPort
) -> None:
    control.answers = [503] * 1000
    send(250)
    assert "250 events wait" in once(IMPATIENT)
    control.answers = []
    send(1)
    assert once(IMPATIENT) == "251 events published.\n"
    assert published_ids(control) == [str(n) for n in range(1, 252)]
    assert once(IMPATIENT) == "0 events published.\n"


def test_proxy_that_stops_taking_events_in_the_middle(
    database: Database, control: ControlPort
) -> None:
    control.answers = [200, 200] + [503] * 1000
    send(250)
    said = once(IMPATIENT)
    assert "50 events wait" in said
    assert "200 events published" in said
    assert len(published_ids(control)) == 200


def test_slow_proxy_is_waited_for_as_long_as_it_takes_events(
    database: Database, control: ControlPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second for each of 6 batches, while 2.5 seconds without any are too long."""

    def take(body: bytes) -> None:
        time.sleep(0.5)
        control.items += json.loads(body)["items"]

    monkeypatch.setattr(control, "take", take)
    send(600)
    assert once(Limits(command_patience=2.5)) == "600 events published.\n"


def test_refused_events_count_as_published_where_a_hint_took_their_place(
    database: Database, control: ControlPort
) -> None:
    control.refused = "poison"
    send_events([("a", "message", "poison" if n == 3 else n) for n in range(10)])
    assert once() == "10 events published.\n"


def test_without_a_proxy_it_says_what_it_sequenced(database: Database) -> None:
    send(3)
    said = once()
    assert said.startswith("3 events sequenced.")
    assert "GRIP_URL" in said
    assert once().startswith("0 events sequenced.")
    assert database.value("SELECT count(*) FROM pg_eventstream_stream") == 3


def test_backlog_that_takes_several_calls_is_sequenced_to_its_end(database: Database) -> None:
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data)"
        " SELECT 'a', '1' FROM generate_series(1, 60000)"
    )
    with database.connect(autocommit=False) as connection:
        row = connection.execute("SELECT pg_eventstream_sequence()").fetchone()
        assert row
        assert row[0] < 60_000
        connection.rollback()
    assert once().startswith("60000 events sequenced.")


def test_events_that_somebody_else_sequenced_are_published(
    database: Database, control: ControlPort
) -> None:
    send(3)
    database.execute("SELECT pg_eventstream_sequence()")
    send(2)
    assert once() == "5 events published.\n"


def test_it_ends_although_events_keep_arriving(database: Database, control: ControlPort) -> None:
    """It publishes those that existed when it began."""
    send(2000)
    over = threading.Event()

    def go_on() -> None:
        with database.connect() as connection:
            while not over.is_set():
                connection.execute(
                    "INSERT INTO pg_eventstream_event (channel, data) VALUES ('b', '1')"
                )

    senders = [threading.Thread(target=go_on) for _ in range(2)]
    for sender in senders:
        sender.start()
    try:
        wait_until(
            lambda: database.value("SELECT count(*) > 2050 FROM pg_eventstream_event"), timeout=20
        )
        said = once()
    finally:
        over.set()
        for sender in senders:
            sender.join()
    ids = [item["id"] for item in control.items if item["channel"] == "events-a" and "id" in item]
    assert ids == [str(n) for n in range(1, 2001)]
    assert said == f"{len(published_ids(control))} events published.\n"


# The lead


class Application:
    """Two sessions that behave like processes of the application under load.

    One of them always holds the leader's lock in share mode, unless their attempts fail.
    """

    def __init__(self, database: Database) -> None:
        self._sessions = [database.connect(autocommit=False) for _ in range(2)]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.is_set():
            for session, other in (self._sessions, self._sessions[::-1]):
                session.execute(f"SELECT {LEAD}")
                other.commit()
                time.sleep(0.002)

    def __enter__(self) -> Application:
        self._sessions[0].execute(f"SELECT {LEAD}")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        for session in self._sessions:
            session.close()


def test_application_processes_that_sequence_are_no_obstacle(
    database: Database, control: ControlPort
) -> None:
    with Application(database):
        for _ in range(5):
            send(1)
            assert once() == "1 events published.\n"


@pytest.mark.thorough
@pytest.mark.faults
@pytest.mark.timeout(300)
def test_busy_servers_are_no_obstacle(
    database: Database, control: ControlPort, channel: str
) -> None:
    """Servers that stream directly, under load: each run takes the lead from them."""
    load = Load(database, channel, senders=4, pause=0.001)
    with ExitStack() as stack:
        for n in range(3):
            port = free_port()
            server = ForkedProcess(
                f"server {n}",
                [sys.executable, "-m", "uvicorn", "tests.project.asgi:application",
                 f"--port={port}", "--log-level=warning"],
                log_path=DIRECTORY / f"once-{database.name}-{n}.log",
                environment=child_environment(),
            )  # fmt: skip
            server.start(ready=lambda port=port: accepts(port))  # type: ignore[misc]
            stack.callback(server.kill)
            client = SSEClient(f"http://127.0.0.1:{port}/events/", [channel])
            stack.enter_context(client).wait_open()
        with load.running():
            for _ in range(20):
                client.wait_count(len(client.events) + 10)
                assert once().endswith(" events published.\n")
        load.check(client)


def test_application_processes_do_not_keep_a_publisher_from_leading(
    database: Database, control: ControlPort, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pg_eventstream")
    publisher = Publisher(Connector("default"))
    with Application(database):
        thread = threading.Thread(target=publisher.run)
        thread.start()
        try:
            wait_until(lambda: ": leading" in caplog.text, timeout=20)
        finally:
            publisher.stop()
            thread.join()
    assert "standing by" not in caplog.text  # no publisher leads


def test_publisher_takes_over_despite_any_work_of_the_application(
    database: Database, control: ControlPort, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pg_eventstream")
    publisher = Publisher(Connector("default"))
    with database.connect(application_name="pg_eventstream leader") as leader:
        leader.execute(f"SELECT pg_advisory_lock({LOCK_SPACE}, {LEADER_LOCK})")
        thread = threading.Thread(target=publisher.run)
        thread.start()
        try:
            wait_until(lambda: "standing by" in caplog.text, timeout=20)
            with Application(database):
                leader.close()
                wait_until(lambda: ": leading" in caplog.text, timeout=20)
        finally:
            publisher.stop()
            thread.join()


def test_application_that_does_not_give_the_lock_back_is_named(
    database: Database, control: ControlPort
) -> None:
    database.execute(
        "INSERT INTO pg_eventstream_publisher VALUES (1, 'gone.example:1', now(), now())"
    )
    with database.connect(autocommit=False, application_name="a site") as session:
        session.execute(f"SELECT {LEAD}")
        said = once(IMPATIENT)
        assert said.startswith("failed: ")
        assert f"session {session.info.backend_pid}" in said
        assert "a site" in said
        assert "gone.example" not in said
    assert control.items == []


def test_leader_is_named_by_who_leads(database: Database, control: ControlPort) -> None:
    """Not by the one that led last."""
    take = f"SELECT pg_advisory_lock({LOCK_SPACE}, {LEADER_LOCK})"
    row = "INSERT INTO pg_eventstream_publisher VALUES (1, %s, now(), now())"
    database.execute(row, ["gone.example:1"])
    time.sleep(0.001)
    with database.connect(application_name="pg_eventstream leader") as leader:
        leader.execute(take)
        pid = leader.info.backend_pid
        with pytest.raises(NotLeading) as raised:
            Publisher(Connector("default")).run_once()
        assert f"session {pid}" in str(raised.value)
        assert "gone.example" not in str(raised.value)

        leader.execute("DELETE FROM pg_eventstream_publisher")
        leader.execute(row, ["there.example:2"])
        with pytest.raises(NotLeading, match=f"publisher there.example:2.*session {pid}"):
            Publisher(Connector("default")).run_once()
    assert control.items == []


def test_two_at_once_publish_everything_and_both_succeed(
    database: Database, control: ControlPort
) -> None:
    send(500)
    with ThreadPoolExecutor(3) as threads:
        said = list(threads.map(lambda _: once(), range(3)))
    counts = sorted(int(line.split()[0]) for line in said)
    assert counts == [0, 0, 500], said
    assert published_ids(control) == [str(n) for n in range(1, 501)]


def test_stop_while_it_waits_for_the_lead(database: Database, control: ControlPort) -> None:
    publisher = Publisher(Connector("default"))
    with database.connect(autocommit=False) as session, ThreadPoolExecutor(1) as threads:
        session.execute(f"SELECT {LEAD}")
        running = threads.submit(publisher.run_once)
        waits = (
            "SELECT count(*) = 1 FROM pg_locks"
            " WHERE locktype = 'advisory' AND NOT granted AND database ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        wait_until(lambda: database.value(waits), timeout=20)
        publisher.stop()
        error = running.exception(_AT_MOST)
    assert "stopped" in str(error).lower()
    assert not isinstance(error, psycopg.Error)


# The database


LOCKS = {
    "the cursor": "SELECT pg_eventstream_sequence()",
    "who publishes": "LOCK TABLE pg_eventstream_publisher",
    "the proxies": "LOCK TABLE pg_eventstream_proxy",
    "what is pruned": "LOCK TABLE pg_eventstream_channel",
}


@pytest.mark.parametrize(
    ("name", "arguments", "lock"),
    [
        pytest.param("eventstream_publisher", ["--once"], LOCKS["the cursor"], id="once"),
        *(
            pytest.param("eventstream_publisher", ["--once"], LOCKS[name], id=name, marks=RARER)
            for name in ("who publishes", "the proxies", "what is pruned")
        ),
        pytest.param("eventstream_prune", [], LOCKS["what is pruned"], id="prune"),
    ],
)
def test_transaction_that_holds_a_lock_is_not_waited_for_without_end(
    database: Database,
    control: ControlPort,
    name: str,
    arguments: list[str],
    lock: str,
) -> None:
    send(1)
    database.execute("SELECT pg_eventstream_sequence()")
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '48 h'")
    database.execute(
        "INSERT INTO pg_eventstream_proxy (name, position) VALUES (%s, 1)", [control.url]
    )
    with database.connect(autocommit=False) as session:
        session.execute("SELECT pg_current_xact_id()")
        session.execute(lock)
        said = command(name, *arguments, limits=IMPATIENT)
    assert said.startswith("failed: "), said
    assert "lock" in said
    assert "pg_blocking_pids" in said


def test_what_was_published_is_said_though_pruning_fails(
    database: Database, control: ControlPort
) -> None:
    send(3)
    said = StringIO()
    publish = with_limits("eventstream_publisher", IMPATIENT)
    with database.connect(autocommit=False) as session:
        session.execute(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {PRUNE_LOCK})")
        with pytest.raises(CommandError, match="lock timeout"):
            call_command(publish, "--once", verbosity=0, stdout=said)
        assert said.getvalue() == "3 events published.\n"
        control.answers = [503] * 1000
        send(2)
        with pytest.raises(CommandError, match="2 events wait"):
            call_command(publish, "--once", verbosity=0, stdout=said)


@contextmanager
def through(database: Database) -> Iterator[Network]:
    """Connects Django's settings through a network."""
    wrapper = connections["default"]
    port = wrapper.settings_dict["PORT"]
    with Network(database.postgres.port) as network:
        wrapper.settings_dict["PORT"] = str(network.port)
        connections.close_all()
        try:
            yield network
        finally:
            connections.close_all()
            wrapper.settings_dict["PORT"] = port


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("eventstream_publisher", ["--once"]),
        pytest.param("eventstream_prune", [], marks=RARER),
    ],
)
def test_database_that_stops_responding_is_not_waited_for_without_end(
    database: Database,
    control: ControlPort,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arguments: list[str],
) -> None:
    monkeypatch.setitem(connection_module._PARAMETERS, "connect_timeout", 2)
    send(3)
    with through(database) as network:
        if name == "eventstream_publisher":
            monkeypatch.setattr(control, "take", lambda body: network.deaf())
        else:
            monkeypatch.setattr(
                "pg_eventstream.publisher.pruner.Pruner._forget", _deaf_first(network), raising=True
            )
        said = command(name, *arguments, limits=replace(IMPATIENT, silence=0.5))
    assert said.startswith("failed: Database: silent, and cannot be asked why"), said


def _deaf_first(network: Network) -> Callable[..., None]:
    from pg_eventstream.publisher.pruner import Pruner

    forget = Pruner._forget

    def deaf_first(sweep: Pruner) -> None:
        network.deaf()
        forget(sweep)

    return deaf_first


# What is counted


def test_changes_of_permission_are_published(database: Database, control: ControlPort) -> None:
    channel_permission_changed(None, "a")
    assert once() == "1 events published.\n"
    send_event("a", "message", 1)
    assert once() == "1 events published.\n"
