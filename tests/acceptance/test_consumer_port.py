"""``eventstream_consumers run --metrics-port``: what all processes count together, and probes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pg_eventstream
from pg_eventstream import send_events
from pg_eventstream.servers.processes import HOST, Process, free_port, wait_until
from tests.support.consumers import Handled, declared
from tests.support.database import Database
from tests.support.environment import DIRECTORY, child_environment
from tests.support.prometheus import prometheus

SHIPPED = Path(pg_eventstream.__file__).parent / "operate" / "prometheus"
ALERTS = (SHIPPED / "alerts.yml").read_text()


@contextmanager
def running(
    port: int, *arguments: str, environment: dict[str, str], path: Path
) -> Iterator[Process]:
    """The command in a program that begins anew, as in production."""
    process = Process(
        "the consumers",
        [sys.executable, "-m", "django", "eventstream_consumers", "run",
         "--metrics-port", str(port), *arguments],
        log_path=DIRECTORY / f"consumers-{port}.log",
        environment={**child_environment(), **environment, "TMPDIR": str(path)},
    )  # fmt: skip
    process.start()
    try:
        yield process
    finally:
        process.stop(timeout=30)


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()
    except OSError:
        return 0, ""


def number(text: str, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (.+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.thorough
@pytest.mark.faults
def test_port_counts_for_all_processes_and_ends_with_them(
    database: Database, tmp_path: Path
) -> None:
    """And a real Prometheus finds what the dashboard and the alerts ask for."""
    handled = Handled(database)
    environment = declared({"name": "all", "handler": "record", "start": "earliest"})
    port, counters, data = free_port(), tmp_path / "counters", tmp_path / "prometheus"
    counters.mkdir()
    data.mkdir()
    with running(port, "--processes", "2", environment=environment, path=counters) as process:
        pids = "SELECT count(DISTINCT holder) FROM pg_eventstream_slot WHERE holder <> ''"
        wait_until(lambda: database.value(pids) == 2, timeout=30)
        wait_until(lambda: get(port, "/ready")[0] == 200, timeout=30)
        assert get(port, "/live") == (200, "ok\n")
        with prometheus(port, data, ALERTS) as server:
            series = 'pg_eventstream_consumer_handled_events_total{consumer="all"}'
            wait_until(lambda: bool(server.query(series)), timeout=30)
            send_events([(f"c{n}", "message", n) for n in range(100)])
            handled.wait("all", 100)
            wait_until(lambda: number(get(port, "/metrics")[1], series) == 100, timeout=30)
            text = get(port, "/metrics")[1]
            assert number(text, 'pg_eventstream_consumer_processes{consumer="all"}') == 2
            calls = 'pg_eventstream_consumer_handler_seconds_count{consumer="all"}'
            assert number(text, calls) == 100
            assert len([*counters.rglob("counter_*.db")]) >= 2  # both count
            rate = f"rate({series.partition('{')[0]}[10s]) > 0"
            wait_until(lambda: bool(server.query(rate)), timeout=30)
            assert [one for one in of_consumers() if not server.query(one)] == []
            assert not {name for name in server.firing if "Consumer" in name}

            database.execute("UPDATE pg_eventstream_slot SET stopped = true, error = 'no'")
            wait_until(lambda: get(port, "/ready")[0] == 503, timeout=30)
            assert "has stopped" in get(port, "/ready")[1]
            wait_until(lambda: "EventStreamConsumerStopped" in server.firing, timeout=30)
        assert process.running
    assert get(port, "/live")[0] == 0
    assert [*counters.iterdir()] == []


def of_consumers() -> list[str]:
    """The dashboard's queries about consumers."""
    dashboard = json.loads((SHIPPED / "grafana.json").read_text())
    found = [
        target["expr"].replace("$job", ".*").replace("$__rate_interval", "10s")
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        if "_consumer_" in target["expr"]
    ]
    assert len(found) > 15
    return found


@pytest.mark.thorough
@pytest.mark.faults
def test_port_that_is_taken_is_named(database: Database, tmp_path: Path) -> None:
    environment = declared({"name": "all", "handler": "record", "start": "earliest"})
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with running(port, environment=environment, path=tmp_path) as process:
            wait_until(lambda: not process.running, timeout=30)
            assert process.returncode == 1
    log = (DIRECTORY / f"consumers-{port}.log").read_text()
    assert f"--metrics-port: cannot listen on {HOST}, port {port}" in log
    assert [*tmp_path.iterdir()] == []


@pytest.mark.thorough
@pytest.mark.faults
def test_process_that_serves_is_replaced(database: Database, tmp_path: Path) -> None:
    environment = declared({"name": "all", "handler": "record", "start": "earliest"})
    port = free_port()
    with running(port, environment=environment, path=tmp_path) as process:
        wait_until(lambda: get(port, "/ready")[0] == 200, timeout=30)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        holder = database.value("SELECT max(holder) FROM pg_eventstream_slot")
        worker = holder.partition(":")[2].partition("/")[0]
        (server,) = {*children} - {worker}
        os.kill(int(server), signal.SIGKILL)
        wait_until(lambda: get(port, "/ready")[0] == 200, timeout=60)
        assert database.value("SELECT max(holder) FROM pg_eventstream_slot") == holder
