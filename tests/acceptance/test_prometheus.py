"""A real Prometheus scrapes a real publisher: the alerts, the dashboard, and the probes."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import pg_eventstream
from pg_eventstream import send_events
from pg_eventstream.servers.processes import HOST, free_port, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.application import application
from tests.support.database import Database
from tests.support.environment import publishes_to
from tests.support.network import Network
from tests.support.pgbouncer import pgbouncer
from tests.support.programs import installed
from tests.support.prometheus import Prometheus, prometheus
from tests.support.publisher import NewPublisher, PublisherProcess
from tests.support.sse_client import OpenStream, SSEClient

SHIPPED = Path(pg_eventstream.__file__).parent / "operate" / "prometheus"
ALERTS = (SHIPPED / "alerts.yml").read_text()
DASHBOARD = json.loads((SHIPPED / "grafana.json").read_text())


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    result = response.status, response.read().decode()
    connection.close()
    return result


def why_not_ready(port: int) -> str:
    status, text = get(port, "/ready")
    assert (status == 200) == (text == "ok\n")
    return "" if status == 200 else text


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def measured(new_publisher: NewPublisher, port: int) -> PublisherProcess:
    """A publisher that leads, with its port."""
    publisher = new_publisher(f"--metrics-port={port}").lead()
    wait_until(lambda: not why_not_ready(port), timeout=20)
    return publisher


@pytest.fixture
def scraping(measured: PublisherProcess, port: int, tmp_path: Path) -> Iterator[Prometheus]:
    with prometheus(port, tmp_path, ALERTS) as server:
        wait_until(lambda: bool(server.query("pg_eventstream_up == 1")), timeout=20)
        yield server


def expressions() -> list[str]:
    found = []
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$job", ".*")
            found.append(expression.replace("$__rate_interval", "10s"))
    return found


def test_rules_and_metrics_pass_promtool(measured: PublisherProcess, port: int) -> None:
    promtool = installed("promtool")
    subprocess.run([promtool, "check", "rules", SHIPPED / "alerts.yml"], check=True)
    _, text = get(port, "/metrics")
    # Those of Python and of the process are not ours.
    ours = re.findall(r"^(?:# \w+ )?pg_eventstream_.*\n", text, re.MULTILINE)
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input="".join(ours),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_queries_of_the_dashboard_find_something(
    database: Database, scraping: Prometheus, measured: PublisherProcess, channel: str
) -> None:
    send_events([(channel, "message", n) for n in range(50)])
    published = 'pg_eventstream_published_events_total{job="eventstream"} >= 50'
    wait_until(lambda: bool(scraping.query(published)), timeout=20)
    rate = "sum(rate(pg_eventstream_published_events_total[10s]))"
    send_events([(channel, "message", n) for n in range(50)])
    wait_until(lambda: any(float(s["value"][1]) > 0 for s in scraping.query(rate)), timeout=20)
    empty = [one for one in expressions() if not scraping.query(one)]
    assert [one for one in empty if "probe_" not in one and "_consumer_" not in one] == []
    assert len(expressions()) > 40


def test_nothing_fires_while_all_is_well_and_probes_and_alerts_turn_when_it_is_not(
    database: Database,
    pushpin: Pushpin,
    new_publisher: NewPublisher,
    port: int,
    tmp_path: Path,
) -> None:
    with Network(pushpin.control_port) as network:
        environment = publishes_to(f"http://{HOST}:{network.port}")
        publisher = new_publisher(f"--metrics-port={port}", **environment).lead()
        standby_port = free_port()
        standby = new_publisher(f"--metrics-port={standby_port}", **environment)
        standby.start()
        with prometheus(port, tmp_path, ALERTS) as server:
            standby.wait_for_log("standing by")
            wait_until(lambda: not why_not_ready(port), timeout=20)
            wait_until(lambda: not why_not_ready(standby_port), timeout=20)
            wait_until(lambda: bool(server.query("pg_eventstream_up == 1")), timeout=20)
            wait_until(lambda: not server.firing, timeout=20)
            database.send("a")
            wait_until(
                lambda: bool(server.query("pg_eventstream_published_events_total >= 1")),
                timeout=20,
            )
            assert server.firing == set()

            # The proxy is unreachable. A standby remains ready.
            network.cut()
            database.send("a")
            wait_until(lambda: "cannot be reached" in why_not_ready(port), timeout=20)
            wait_until(lambda: "EventStreamProxyTrouble" in server.firing, timeout=20)
            assert get(port, "/live") == (200, "ok\n")
            assert why_not_ready(standby_port) == ""
            network.heal()
            wait_until(lambda: not why_not_ready(port), timeout=30)

            # The trigger is disabled.
            alter = "ALTER TABLE pg_eventstream_event {} TRIGGER ALL"
            database.execute(alter.format("DISABLE"))
            wait_until(lambda: "trigger" in why_not_ready(port).lower(), timeout=20)
            wait_until(lambda: "EventStreamTriggerMissing" in server.firing, timeout=20)
            database.execute(alter.format("ENABLE"))
            wait_until(lambda: not why_not_ready(port), timeout=20)

            # The publisher is killed: the standby takes over, and nothing scrapes the dead one.
            publisher.kill()
            wait_until(lambda: "EventStreamNotScraped" in server.firing, timeout=20)
            standby.wait_for_log(": leading")
            wait_until(lambda: not why_not_ready(standby_port), timeout=20)


TOKEN = "a-token-for-tests-" + "x" * 20


@pytest.mark.faults
@pytest.mark.thorough
def test_application_reports_that_the_publisher_was_stopped_or_cannot_listen(
    database: Database,
    publisher: PublisherProcess,
    new_publisher: NewPublisher,
    tmp_path: Path,
) -> None:
    """The view needs no publisher, and a dead leader leaves no value."""
    port, own_port = free_port(), free_port()
    settings = json.dumps({"EVENTSTREAM_METRICS_TOKEN": TOKEN})
    app = application(port, log_path=tmp_path / "app.log", PG_EVENTSTREAM_TEST_SETTINGS=settings)
    try:
        with prometheus(port, tmp_path, ALERTS, TOKEN) as server:
            leads = "pg_eventstream_leader_present == 1"
            wait_until(lambda: bool(server.query(leads)), timeout=20)
            wait_until(lambda: not server.firing, timeout=20)
            publisher.stop()
            wait_until(lambda: "EventStreamNoLeader" in server.firing, timeout=20)
            wait_until(lambda: not server.query("pg_eventstream_listen_works"), timeout=20)
            database.execute(
                "UPDATE pg_eventstream_publisher SET heartbeat = now() - interval '61 s'"
            )
            wait_until(lambda: "EventStreamHeartbeatOld" in server.firing, timeout=20)

            # Another one leads, through a pooler, and cannot listen.
            with pgbouncer(database) as dsn:
                new_publisher(f"--metrics-port={own_port}", f"--dsn={dsn}").lead()
                wait_until(lambda: server.firing == {"EventStreamListenFails"}, timeout=20)
                wait_until(lambda: "LISTEN does not work" in why_not_ready(own_port), timeout=20)
                assert get(own_port, "/live") == (200, "ok\n")
    finally:
        app.kill()


def test_view_adds_up_the_counters_of_all_processes(
    database: Database,
    pushpin: Pushpin,
    app_port: int,
    channel: str,
    tmp_path: Path,
) -> None:
    """In the multiprocess mode of prometheus-client."""
    (tmp_path / "counters").mkdir()
    environment = {
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "counters"),
        "PG_EVENTSTREAM_TEST_SETTINGS": json.dumps({"EVENTSTREAM_METRICS_TOKEN": TOKEN}),
        "WEB_CONCURRENCY": "2",  # read by Gunicorn
    }
    app = application(app_port, pushpin, kind="wsgi", log_path=tmp_path / "app.log", **environment)

    def shown() -> str:
        request = urllib.request.Request(
            f"http://{HOST}:{app_port}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            return str(response.read().decode())

    try:
        for n in range(10):
            with SSEClient(
                f"{pushpin.url}/events/", [channel], last_event_id=f"{channel}:{n + 7}"
            ) as client:
                client.wait_open()
        line = 'pg_eventstream_recoveries_total{outcome="reset"} 10.0'
        wait_until(lambda: line in shown(), timeout=20)
        assert "pg_eventstream_up 1.0" in shown()
        assert len([*(tmp_path / "counters").glob("counter_*.db")]) >= 2
    finally:
        app.kill()


def test_publisher_works_without_the_extra_and_says_what_the_port_needs(
    database: Database,
    new_publisher: NewPublisher,
    stream: OpenStream,
    channel: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError")
    path = {"PYTHONPATH": str(tmp_path)}
    refused = new_publisher("--metrics-port=0", **path)
    refused.start()
    wait_until(lambda: not refused.running, timeout=20)
    assert refused.returncode == 1
    assert "pip install 'pg-eventstream[metrics]'" in refused.log
    client = stream(channel).wait_open()
    new_publisher(**path).lead()
    database.send(channel)
    client.wait_count(1)
