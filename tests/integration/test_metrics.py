"""Gauges of the database's state: what a scrape says, and what it costs."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from django.contrib.auth.models import Permission, User
from django.core.exceptions import ImproperlyConfigured
from django.test import Client, override_settings
from django.urls import path
from prometheus_client.parser import text_string_to_metric_families

from pg_eventstream import send_event, views
from pg_eventstream.operate.prometheus.latest import Latest
from pg_eventstream.operate.prometheus.metrics import GAUGES, encode, latest_state, registry
from pg_eventstream.operate.state import Problem, State, Waiting
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.rounds import publish_once
from tests.support.states import CONSUMER, HEALTHY, PROXY, state


def values(text: str) -> dict[str, float]:
    """The gauges of the event stream by their names, with the value of the label."""
    return {
        "/".join([sample.name.removeprefix("pg_eventstream_"), *sample.labels.values()]): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(found: State | Exception) -> dict[str, float]:
    def read() -> State:
        if isinstance(found, Exception):
            raise found
        return found

    body, content_type = encode(registry(Latest(read), with_counters=False), "text/plain")
    assert content_type.startswith("text/plain")
    return values(body.decode())


def test_every_value_of_a_healthy_state() -> None:
    proxy, table = PROXY.name, "pg_eventstream_event"
    assert scrape(HEALTHY) == {
        "up": 1,
        "leader_present": 1,
        "publishers_standing_by": 1,
        "heartbeat_age_seconds": 4,
        "listen_works": 1,
        "waiting_events": 2,
        "waiting_oldest_seconds": 0.5,
        f"proxy_lag_events/{proxy}": 10,
        f"proxy_lag_seconds/{proxy}": 1.5,
        f"proxy_trouble/{proxy}": 0,
        "consumer_lag_events/stock": 3,
        "consumer_lag_seconds/stock": 0.5,
        "consumer_processes/stock": 2,
        "consumer_unheld_slots/stock": 0,
        "consumer_heartbeat_age_seconds/stock": 7,
        "consumer_paused/stock": 0,
        "consumer_replaying/stock": 0,
        "consumer_declared/stock": 1,
        "consumer_failing_slots/stock": 0,
        "consumer_stopped_slots/stock": 0,
        "consumer_parked/stock": 0,
        "pruning_behind_seconds": 0,
        "notification_queue_usage_ratio": 0.01,
        "oldest_transaction_seconds": 7,
        f"table_live_rows/{table}": 100,
        f"table_dead_rows/{table}": 5,
        f"table_size_bytes/{table}": 8192,
        "trigger_ok": 1,
        "problems": 0,
        "probe_success": 1,
        "probe_age_seconds": 60,
        "probe_received_seconds": 0.25,
    }


DISABLED = Problem(id="pg_eventstream.E021", message="The trigger is disabled.", hint=None)
TROUBLED = replace(PROXY, trouble="cannot be reached", lag_events=None, lag_seconds=None)


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"leader": None}, {"leader_present": 0, "listen_works": None,
                            f"proxy_trouble/{PROXY.name}": None}),
        ({"publisher": None, "heartbeat_seconds": None}, {"heartbeat_age_seconds": None}),
        ({"report": {}}, {"listen_works": None}),
        ({"report": {"listens": False}}, {"listen_works": 0}),
        # Through a pooler.
        ({"report": {"listens": False}, "leader": None}, {"listen_works": 0}),
        ({"report": {"listens": False}, "leader": None, "heartbeat_seconds": 31.0},
         {"leader_present": 0, "listen_works": None, "heartbeat_age_seconds": 31,
          f"proxy_trouble/{PROXY.name}": None}),
        ({"waiting": Waiting(count=0, oldest_seconds=None)},
         {"waiting_events": 0, "waiting_oldest_seconds": 0}),
        ({"waiting": Waiting(count=None, oldest_seconds=None)},
         {"waiting_events": None, "waiting_oldest_seconds": None}),
        ({"proxies": [TROUBLED]},
         {f"proxy_trouble/{PROXY.name}": 1, f"proxy_lag_events/{PROXY.name}": None,
          f"proxy_lag_seconds/{PROXY.name}": None}),
        ({"consumers": [replace(CONSUMER, lag_events=None, lag_seconds=None, declared=None,
                                heartbeat_seconds=None, registered=False)]},
         {"consumer_lag_events/stock": None, "consumer_lag_seconds/stock": None,
          "consumer_declared/stock": None, "consumer_unheld_slots/stock": None,
          "consumer_heartbeat_age_seconds/stock": None}),
        ({"consumers": [replace(CONSUMER, paused=True, parked=4, replay_to=9, unheld_slots=[1])]},
         {"consumer_paused/stock": 1, "consumer_parked/stock": 4, "consumer_replaying/stock": 1,
          "consumer_unheld_slots/stock": 1}),
        ({"problems": [DISABLED]}, {"trigger_ok": 0, "problems": 1}),
        ({"problems": [replace(DISABLED, id="pg_eventstream.W021")]}, {"problems": 1}),
        ({"oldest_transaction": None}, {"oldest_transaction_seconds": 0}),
        ({"doctor": None, "doctor_seconds": None},
         {"probe_success": None, "probe_age_seconds": None, "probe_received_seconds": None}),
        ({"doctor": {"ok": False, "seconds": {}}},
         {"probe_success": 0, "probe_received_seconds": None}),
    ],
)  # fmt: skip
def test_what_is_not_known_is_left_out(
    changes: dict[str, Any], changed: dict[str, float | None]
) -> None:
    expected: dict[str, float | None] = {**scrape(HEALTHY), **changed}
    known = {name: value for name, value in expected.items() if value is not None}
    assert scrape(state(**changes)) == known


@pytest.mark.parametrize(
    "error",
    [
        psycopg.OperationalError("connection refused"),
        ImproperlyConfigured("EVENTSTREAM_DATABASE is wrong"),
        TimeoutError("The database did not answer."),
    ],
)
def test_database_that_cannot_be_read_leaves_one_gauge(error: Exception) -> None:
    assert scrape(error) == {"up": 0}


def test_state_of_a_real_database(database: Database, control: ControlPort) -> None:
    send_event("a", "message", 1)
    publish_once()
    send_event("a", "message", 2)
    found = values(encode(registry(latest_state(), with_counters=False), "")[0].decode())
    assert found["up"] == 1
    assert found["leader_present"] == 0
    assert found["trigger_ok"] == 1
    assert found["waiting_events"] == 1
    assert found[f"proxy_lag_events/{control.url}"] == 1
    assert 0 <= found["heartbeat_age_seconds"] < 60
    assert found["table_size_bytes/pg_eventstream_event"] > 0
    with database.connect() as connection:
        connection.execute("ALTER TABLE pg_eventstream_event DISABLE TRIGGER ALL")
        found = values(encode(registry(latest_state(), with_counters=False), "")[0].decode())
    assert found["trigger_ok"] == 0


def test_scrapes_at_the_same_time_share_one_read() -> None:
    reads: list[int] = []
    began, release = threading.Event(), threading.Event()

    def read() -> int:
        reads.append(1)
        began.set()
        assert release.wait(20)
        return len(reads)

    latest = Latest(read, seconds=3600)
    results: list[int] = []
    callers = [threading.Thread(target=lambda: results.append(latest.get(20))) for _ in range(10)]
    for caller in callers:
        caller.start()
    assert began.wait(20)
    with pytest.raises(TimeoutError, match="did not answer within"):
        latest.get(0.01)
    release.set()
    for caller in callers:
        caller.join()
    assert results == [1] * 10
    assert latest.get(20) == 1


def test_later_scrape_reads_again_and_an_error_is_not_kept() -> None:
    reads: Iterator[int | Exception] = iter([ValueError("away"), 2, 3])

    def read() -> int:
        found = next(reads)
        if isinstance(found, Exception):
            raise found
        return found

    latest = Latest(read, seconds=0)
    with pytest.raises(ValueError, match="away"):
        latest.get(20)
    time.sleep(0.001)
    assert latest.get(20) == 2
    time.sleep(0.001)
    assert latest.get(20) == 3


# The view

urlpatterns = [path("metrics", views.metrics)]
TOKEN = "a-token-for-tests-" + "x" * 20


@pytest.fixture
def client(database: Database) -> Iterator[Client]:
    with override_settings(ROOT_URLCONF=__name__):
        yield Client()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    ("token", "headers", "status"),
    [
        (None, {}, 403),
        (None, bearer(""), 403),
        (None, bearer("None"), 403),
        (TOKEN, {}, 401),
        (TOKEN, bearer(""), 401),
        (TOKEN, bearer(TOKEN[:-1]), 401),
        (TOKEN, bearer(f"{TOKEN}x"), 401),
        (TOKEN, bearer("ü" * 30), 401),
        (TOKEN, {"Authorization": TOKEN}, 401),
        (TOKEN, {"Authorization": f"Basic {base64.b64encode(TOKEN.encode()).decode()}"}, 401),
        (TOKEN, bearer(TOKEN), 200),
        (TOKEN, {"Authorization": f"bearer  {TOKEN}"}, 200),
    ],
)
def test_view_needs_the_token(
    client: Client, token: str | None, headers: dict[str, str], status: int
) -> None:
    with override_settings(EVENTSTREAM_METRICS_TOKEN=token):
        response = client.get("/metrics", headers=headers)
    assert response.status_code == status
    assert ("WWW-Authenticate" in response) == (status == 401)
    assert "no-store" in response["Cache-Control"]
    assert (b"pg_eventstream_up 1.0" in response.content) == (status == 200)


def test_view_admits_users_with_the_permission(client: Client) -> None:
    user = User.objects.create_user("ann")
    client.force_login(user)
    assert client.get("/metrics").status_code == 403
    user.user_permissions.add(Permission.objects.get(codename="view_event"))
    assert b"pg_eventstream_leader_present 0.0" in client.get("/metrics").content
    user.is_active = False
    user.save()
    assert client.get("/metrics").status_code == 403


def test_view_accepts_a_project_without_users(client: Client) -> None:
    with override_settings(MIDDLEWARE=[]):
        assert client.get("/metrics").status_code == 403


def test_view_only_reads(client: Client) -> None:
    with override_settings(EVENTSTREAM_METRICS_TOKEN=TOKEN):
        assert client.post("/metrics", headers=bearer(TOKEN)).status_code == 405


@pytest.mark.parametrize("token", ["", "short", "x" * 19, 7, b"x" * 40, "with spaces " * 5])
def test_token_that_could_be_guessed_or_sent_wrongly_is_refused(
    client: Client, token: object
) -> None:
    with (
        override_settings(EVENTSTREAM_METRICS_TOKEN=token),
        pytest.raises(ImproperlyConfigured, match="EVENTSTREAM_METRICS_TOKEN"),
    ):
        client.get("/metrics", headers=bearer(str(token)))


def test_names_follow_the_conventions_of_prometheus() -> None:
    for gauge in GAUGES:
        assert gauge.name.startswith("pg_eventstream_")
        assert not gauge.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert gauge.text[0].isupper()
        assert not gauge.text.endswith(".")
