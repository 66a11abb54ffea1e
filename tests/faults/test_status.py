"""``eventstream_status`` names what is broken, says what to do, and finds nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from pg_eventstream.operate import findings
from pg_eventstream.servers.pushpin import Pushpin
from tests.support import breakages as broken
from tests.support.breakages import NO_PROXY, Environment, Installation
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.environment import child_environment
from tests.support.publisher import NewPublisher
from tests.support.sse_client import SSEClient
from tests.support.status import run_status, status, status_with

Breakage = Callable[[Installation], AbstractContextManager[Environment]]


@pytest.fixture
def it(
    database: Database, control: ControlPort, new_publisher: NewPublisher, second_pushpin: Pushpin
) -> Installation:
    return Installation(database, control, new_publisher, second_pushpin)


#: What is broken; the finding and the exit status; what the message and the advice contain.
BREAKAGES: list[tuple[Breakage, str, int, str, str]] = [
    (broken.no_publisher, "no-publisher", 2,
     "No publisher has ever run on the database test_", "manage.py eventstream_publisher"),
    (broken.publisher_killed, "publisher-gone", 2,
     "no other has taken over", "manage.py eventstream_publisher"),
    (broken.leader_suspended, "publisher-silent", 2,
     "has shown no sign of life", "SELECT pg_terminate_backend("),
    (broken.publisher_on_another_database, "publisher-elsewhere", 2,
     "_other' of the same server", "EVENTSTREAM_DATABASE"),
    (broken.publisher_may_not_execute, "publisher-may-not-sequence", 2,
     "role_publisher may not call", "GRANT EXECUTE ON FUNCTION pg_eventstream_sequence() TO"),
    (broken.publisher_behind_pgbouncer, "publisher-without-listen", 1,
     "PgBouncer", "--dsn"),
    (broken.lock_held_that_the_publisher_needs, "events-wait", 2,
     "1 committed events wait", "pg_blocking_pids"),
    (broken.publisher_of_another_version, "versions-differ", 1,
     "runs version 0.0.9", "Install the same version"),
    (broken.proxy_killed, "proxy-unreachable", 2,
     "cannot be reached: [Errno 111] Connection refused; 1 events wait", "Start the proxy"),
    (broken.proxy_killed_while_nothing_is_sent, "proxy-unreachable", 1,
     "takes no events from this process", "Start the proxy"),
    (broken.proxy_refuses_the_key, "proxy-unreachable", 2,
     "answered 401", "key in GRIP_URL"),
    (broken.other_proxy_in_the_publisher, "proxy-not-served", 2,
     "It serves http://127.0.0.1:", "the same GRIP_URL"),
    (broken.no_proxy_in_the_application, "proxy-not-configured", 1,
     "this process has no proxy", "the same GRIP_URL"),
    (broken.other_prefix_in_the_publisher, "prefix-differs", 2,
     "GRIP_PREFIX is '' here and 'staging-' in the publisher", "the same GRIP_PREFIX"),
    (broken.trigger_disabled, "trigger-broken", 2, "disabled", "ENABLE TRIGGER"),
    (broken.trigger_dropped, "trigger-broken", 2, "has no trigger", "pgtrigger install"),
    (broken.functions_dropped, "functions-missing", 2,
     "lacks pg_eventstream_sequence()", "create these functions"),
    (broken.migration_not_applied, "not-migrated", 2,
     "pg_eventstream_report", "python manage.py migrate"),
    (broken.tables_missing, "not-migrated", 2,
     "Tables are missing", "python manage.py migrate"),
    (broken.events_restored_without_the_trigger, "unseen-events", 1,
     "1 of the newest events", "manage.py check --database default"),
    (broken.database_of_replicas, "replica-role", 1, "is 'replica' for all roles", "RESET"),
    (broken.role_without_rights, "role-may-not-read", 1, "pg_eventstream_publisher", "observer"),
    (broken.nothing_prunes, "pruning-behind", 1, "has never run", "manage.py eventstream_prune"),
    (broken.transaction_left_open, "vacuum-held-back", 1,
     "(report) prevents vacuum", "pg_terminate_backend"),
    (broken.transaction_left_prepared, "vacuum-held-back", 1,
     "prepared transaction half", "ROLLBACK PREPARED 'half'"),
    (broken.standby_gone_and_its_slot_left, "vacuum-held-back", 1,
     "replication slot standby_one", "pg_drop_replication_slot('standby_one')"),
    (broken.database_is_a_standby, "database-is-standby", 2,
     "is a standby", "target_session_attrs"),
    (broken.database_is_a_standby_behind_pgbouncer, "database-is-standby", 2,
     "is a standby", "target_session_attrs"),
    (broken.queue_filled, "queue-fills", 1, "notification queue is ", "pg_stat_activity"),
]  # fmt: skip

#: Findings that come with another, whose cause is the same.
ALONG = {
    "events-wait": {"publisher-silent"},
    "database-is-standby": set(),
    "publisher-may-not-sequence": {"publisher-gone"},
    "replica-role": set(),
}


#: Like others in the table, so `make test` leaves them out.
_ALIKE = {
    broken.transaction_left_prepared,
    broken.proxy_refuses_the_key,
    broken.tables_missing,
    broken.database_of_replicas,
    broken.publisher_of_another_version,
    broken.no_proxy_in_the_application,
    broken.database_is_a_standby_behind_pgbouncer,
}


@pytest.mark.parametrize(
    ("breakage", "code", "exit_code", "message", "remedy"),
    [
        pytest.param(
            *row, id=row[0].__name__, marks=[pytest.mark.thorough] if row[0] in _ALIKE else []
        )
        for row in BREAKAGES
    ],
)
def test_breakage_is_diagnosed_by_name(
    it: Installation, breakage: Breakage, code: str, exit_code: int, message: str, remedy: str
) -> None:
    if code == "queue-fills" and it.database.value("SHOW server_version_num") < "170000":
        pytest.skip("PostgreSQL before 17 has a queue of 8 GB")
    level = {1: "degraded", 2: "broken"}[exit_code]
    with breakage(it) as environment:
        found_exit_code, found = status_with(environment, code, level)
    assert (found_exit_code, found["verdict"]) == (exit_code, level), found
    finding = next(one for one in found["findings"] if one["code"] == code)
    assert message in finding["message"], finding
    assert remedy in finding["remedy"], finding
    others = {one["code"] for one in found["findings"]} - {code}
    assert others <= ALONG.get(code, set()), found


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (broken.database_down, "Connection refused"),
        (broken.database_of_another_name, 'database "no_such_database" does not exist'),
        (broken.alias_unknown, "The database 'evnets' is not in DATABASES."),
        (broken.database_not_postgresql, "The database 'default' is not PostgreSQL"),
    ],
)
def test_status_that_could_not_look_exits_with_3(
    it: Installation, breakage: Breakage, message: str
) -> None:
    with breakage(it) as environment:
        code, found = status(environment)
    assert (code, found["verdict"]) == (3, "unknown")
    assert message in found["error"]


def test_person_is_told_why_status_could_not_look(it: Installation) -> None:
    with broken.database_down(it) as environment:
        code, text = run_status(environment)
    assert code == 3
    assert text.startswith("CommandError: Database: ")
    assert "Traceback" not in text


def test_every_finding_of_the_status_is_provoked() -> None:
    """Except for two that take a clock or half a minute; `test_findings` has these."""
    source = Path(findings.__file__).read_text(encoding="utf-8")
    codes = set(re.findall(r'code="([a-z-]+)"', source))
    codes |= {code for code, _ in findings._PROBLEMS.values()}
    assert codes - {row[1] for row in BREAKAGES} == {"clocks-differ", "proxy-late"}


# Healthy


def test_leader_and_a_standby_are_healthy(it: Installation) -> None:
    leader, standby = it.lead(), it.publisher()
    standby.start()
    standby.wait_for_log("standing by")
    it.database.send("c")
    code, found = status(it.environment)
    assert (code, found["findings"]) == (0, [])
    state = found["state"]
    assert state["leader"]["name"] == state["publisher"]
    assert str(leader.pid) in state["publisher"]
    assert len(state["standbys"]) == 1
    assert state["proxies"][0]["reachable"]
    assert it.control.items[1:] == []  # the question has published nothing


def test_publisher_that_sleeps_without_a_safety_poll_is_healthy_for_days(it: Installation) -> None:
    it.lead(PG_EVENTSTREAM_TEST_SAFETY_POLL="off")
    it.database.send("c")
    asleep = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 1"
    deadline = time.monotonic() + 20
    while it.database.value(asleep):
        assert time.monotonic() < deadline
    it.database.execute(
        "UPDATE pg_eventstream_publisher SET leading_since = now() - interval '9 days'"
    )
    code, found = status(it.environment)
    assert (code, found["findings"]) == (0, [])
    assert found["state"]["awake"] is False
    assert found["state"]["report"]["safety_poll"] is None


def test_application_that_streams_without_a_proxy_is_healthy(
    database: Database, serve: Any, channel: str
) -> None:
    with SSEClient(serve(), [channel]) as client:
        client.wait_open()
        database.send(channel, "1")
        client.wait_count(1)
        code, found = status(NO_PROXY)
    assert (code, found["findings"], found["state"]["hubs"]) == (0, [], 1)
    assert found["state"]["waiting"]["count"] == 0


def test_database_that_nobody_uses_is_healthy(database: Database) -> None:
    code, text = run_status(NO_PROXY)
    assert code == 0
    assert ": HEALTHY " in text.splitlines()[0]


def test_program_can_watch_line_by_line_and_stop_reading(database: Database) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "django", "eventstream_status", "--json", "--watch", "0.1",
         "--database", "default"],
        env={**child_environment(), **NO_PROXY}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as command:  # fmt: skip
        assert command.stdout is not None
        assert command.stderr is not None
        for _ in range(2):
            assert json.loads(command.stdout.readline())["verdict"] == "healthy"
        command.stdout.close()
        assert command.wait(30) == 0
        assert command.stderr.read() == ""
