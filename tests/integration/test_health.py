"""The publisher's port: alive, ready, and slow clients."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
import pytest
from django.core.management import CommandError, call_command

from pg_eventstream.operate.prometheus import health, server
from pg_eventstream.operate.prometheus.health import Health
from pg_eventstream.operate.prometheus.latest import Latest
from pg_eventstream.operate.prometheus.metrics import registry
from pg_eventstream.operate.prometheus.server import serving
from pg_eventstream.operate.state import Problem, State
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.pruner import Pruner
from pg_eventstream.publisher.vitals import Stage
from pg_eventstream.servers.processes import HOST, free_port, wait_until
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.publisher_thread import running_publisher
from tests.support.states import CONSUMER, HEALTHY, PROXY, state


@dataclass
class FakeVitals:
    stage: Stage = Stage.LEADING
    moved_at: float = field(default_factory=time.monotonic)
    session: int | None = None
    listens: bool = True
    ended_threads: list[str] = field(default_factory=list)
    troubles: dict[str, str] = field(default_factory=dict)


def health_of(
    vitals: FakeVitals, found: State | Exception = HEALTHY, dsn: str = "host=127.0.0.1 port=1"
) -> Health:
    def read() -> State:
        if isinstance(found, Exception):
            raise found
        return found

    return Health(vitals, Connector("default", dsn), Latest(read))


LATE = replace(PROXY, lag_seconds=31.0)
MISSING = Problem(id="pg_eventstream.E021", message="The trigger is missing.", hint=None)
STANDBY = FakeVitals(Stage.STANDING_BY)


@pytest.mark.parametrize(
    ("vitals", "found", "reason"),
    [
        (FakeVitals(), HEALTHY, None),
        (STANDBY, HEALTHY, None),
        # A proxy in trouble is the leader's business, and another publisher has the same settings.
        (STANDBY, state(proxies=[LATE]), None),
        (FakeVitals(), state(doctor={"ok": False}), None),
        (FakeVitals(), state(problems=[replace(MISSING, id="pg_eventstream.W021")]), None),
        (FakeVitals(), psycopg.OperationalError("refused"), "database cannot be read: refused"),
        (FakeVitals(), TimeoutError("no answer"), "database cannot be read: no answer"),
        (FakeVitals(), state(problems=[MISSING]), "The trigger is missing. (pg_eventstream.E021)"),
        (FakeVitals(Stage.CONNECTING), HEALTHY, "not connected to the database"),
        (STANDBY, state(leader=None), "stands by, and no publisher leads"),
        (STANDBY, state(heartbeat_seconds=31.0), "no sign of life for 31 seconds"),
        (FakeVitals(troubles={"http://p": "cannot be reached"}), HEALTHY,
         "The proxy http://p cannot be reached"),
        (FakeVitals(), state(proxies=[LATE]), "waited for the proxy http://proxy:5561 for 31"),
        (FakeVitals(listens=False), HEALTHY, "LISTEN does not work"),
    ],
)  # fmt: skip
def test_ready(vitals: FakeVitals, found: State | Exception, reason: str | None) -> None:
    vitals = replace(vitals, moved_at=time.monotonic())
    reasons = health_of(vitals, found).why_not_ready()
    assert len(reasons) == (reason is not None)
    assert all((reason or "") in given for given in reasons)
    assert health_of(vitals, found).why_not_live() == []  # a restart would help none of these


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"paused": True}, None),
        ({"parked": 3}, None),
        ({"processes": 0}, "The consumer 'stock' is run by no process"),
        ({"heartbeat_seconds": 31.0}, "has shown no sign of life for 31 seconds"),
        ({"lost": 7}, "were pruned, up to position 7"),
        ({"name": "another", "processes": 0}, None),
    ],
)
def test_consumers_are_ready_unless_one_of_theirs_handles_nothing(
    changes: dict[str, Any], reason: str | None
) -> None:
    found = state(consumers=[CONSUMER, replace(CONSUMER, **changes)])
    probes = health.ConsumersHealth({"stock"}, Latest(lambda: found))
    reasons = probes.why_not_ready()
    assert len(reasons) == (reason is not None)
    assert all((reason or "") in given for given in reasons)
    assert probes.why_not_live() == []


def test_consumers_are_not_ready_if_the_database_cannot_be_read() -> None:
    def read() -> State:
        raise psycopg.OperationalError("refused")

    (reason,) = health.ConsumersHealth({"stock"}, Latest(read)).why_not_ready()
    assert reason == "The database cannot be read: refused"


def test_publisher_whose_thread_has_ended_is_not_live() -> None:
    reasons = health_of(FakeVitals(ended_threads=["pruner"])).why_not_live()
    assert reasons == ["The thread 'pruner' has ended, and the log of this process says why."]


def test_main_loop_that_is_stuck_is_not_live_unless_the_database_is_the_reason(
    database: Database,
) -> None:
    stuck = time.monotonic() - health._STUCK_SECONDS - 1
    with database.connect() as session, database.connect() as other:
        vitals = FakeVitals(moved_at=stuck, session=session.info.backend_pid)
        (reason,) = health_of(vitals, dsn=database.dsn).why_not_live()
        assert "The main loop has not moved for 6" in reason
        assert health_of(vitals).why_not_live() == []  # the database does not answer

        other.execute("SELECT pg_advisory_lock(7, 7)")
        waiting = threading.Thread(target=session.execute, args=["SELECT pg_advisory_lock(7, 7)"])
        waiting.start()
        activity = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'"
        wait_until(lambda: database.value(activity) == 1, timeout=20)
        assert health_of(vitals, dsn=database.dsn).why_not_live() == []
        other.execute("SELECT pg_advisory_unlock(7, 7)")
        waiting.join()
    assert health_of(vitals, dsn=database.dsn).why_not_live() != []  # its session has ended
    assert health_of(FakeVitals(moved_at=stuck, session=None)).why_not_live() == []
    connecting = FakeVitals(Stage.CONNECTING, moved_at=stuck)
    assert health_of(connecting).why_not_live() != []


# The vitals of a real publisher


def test_vitals_follow_the_publisher(
    database: Database, control: ControlPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_publisher() as leader, running_publisher() as standby:
        wait_until(
            lambda: (
                {leader.vitals.stage, standby.vitals.stage} == {Stage.LEADING, Stage.STANDING_BY}
            ),
            timeout=20,
        )
        for vitals in (leader.vitals, standby.vitals):
            before = vitals.moved_at
            wait_until(lambda v=vitals, b=before: v.moved_at > b, timeout=20)  # type: ignore[misc]
            assert vitals.ended_threads == []
            assert vitals.listens
            assert database.value(
                "SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [vitals.session]
            )
        control.answers = [503] * 1000
        database.send("a")
        vitals = max((leader.vitals, standby.vitals), key=lambda v: v.stage.value == "leading")
        wait_until(lambda: control.url in vitals.troubles, timeout=20)
        control.answers = []
        wait_until(lambda: not vitals.troubles, timeout=20)


def test_thread_that_ends_is_noticed(
    database: Database, control: ControlPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pruner, "run", lambda *arguments: None)
    with running_publisher() as publisher:
        wait_until(lambda: publisher.vitals.ended_threads == ["pruner"], timeout=20)
    assert publisher.vitals.ended_threads == []


# The server


@pytest.fixture
def port() -> Iterator[int]:
    vitals = FakeVitals(listens=False)
    metrics = registry(Latest(lambda: HEALTHY), with_counters=True)
    with serving("127.0.0.1", 0, metrics, health_of(vitals)) as found:
        yield found


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    result = response.status, response.headers["Content-Type"], response.read().decode()
    connection.close()
    return result


def test_paths(port: int) -> None:
    status, content_type, text = get(port, "/metrics?x=1")
    assert (status, content_type.partition(";")[0]) == (200, "text/plain")
    assert "pg_eventstream_leader_present 1.0" in text
    assert "pg_eventstream_sequenced_events_total" in text
    assert get(port, "/metrics", Accept="application/openmetrics-text")[2].endswith("# EOF\n")
    assert get(port, "/live") == (200, "text/plain; charset=utf-8", "ok\n")
    status, _, text = get(port, "/ready")
    assert status == 503
    assert text.startswith("LISTEN does not work")
    assert get(port, "/")[0] == 404
    assert get(port, "/ready", "HEAD")[::2] == (503, "")
    assert get(port, "/live", "POST")[0] == 501


def test_clients_that_send_nothing_keep_no_one_out(port: int) -> None:
    silent = [socket.create_connection((HOST, port)) for _ in range(3 * server._MOST_CONNECTIONS)]
    begun = time.monotonic()
    assert get(port, "/live")[0] == 200
    assert time.monotonic() - begun < server._REQUEST_SECONDS
    names = [thread.name for thread in threading.enumerate()]
    wait_until(
        lambda: (
            sum(t.name == "metrics request" for t in threading.enumerate())
            <= server._MOST_CONNECTIONS
        ),
        timeout=20,
    )
    assert names
    for connection in silent:
        connection.close()


def test_client_that_sends_slowly_is_disconnected(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_REQUEST_SECONDS", 0.1)
    with socket.create_connection((HOST, port), timeout=20) as connection:
        closed: Callable[[], bool] = lambda: _sends_in_vain(connection)  # noqa: E731
        wait_until(closed, timeout=20, check=0.05)


def _sends_in_vain(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"G")
    except OSError:
        return True
    return False


def test_client_that_leaves_early_is_no_error(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection((HOST, port)) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        connection.shutdown(socket.SHUT_RDWR)
    assert get(port, "/live")[0] == 200
    assert [r for r in caplog.records if r.levelno > logging.INFO] == []


# The command


def test_port_that_is_taken_is_an_error_that_says_so(database: Database) -> None:
    with socket.create_server((HOST, free_port())) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(CommandError, match=f"cannot listen on 127.0.0.1, port {number}"):
            call_command("eventstream_publisher", metrics_port=number)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics_port": 70_000}, "cannot listen on"),
        ({"metrics_port": 0, "metrics_host": "no.such.host.invalid"}, "cannot listen on"),
    ],
)
def test_wrong_addresses(database: Database, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        call_command("eventstream_publisher", **options)
