"""What is judged to be wrong, at the limits that no real fault reaches quickly, and the screen."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pytest
from django.test import override_settings

from pg_eventstream.consumers.progress import ConsumerState, Holder, TroubledSlot, Working
from pg_eventstream.operate.findings import Finding, judge, verdict
from pg_eventstream.operate.screen import WIDTH, render
from pg_eventstream.operate.state import (
    OldestTransaction,
    Problem,
    ProxyState,
    Pruning,
    Session,
    State,
    TableState,
    Waiting,
)

AT = datetime(2026, 11, 27, 12, tzinfo=timezone.utc)
PROXY = ProxyState(
    name="http://proxy:5561",
    configured=True,
    position=1000,
    lag_events=0,
    lag_seconds=0.0,
    reachable=True,
)
HEALTHY = State(
    at=AT,
    alias="default",
    database="shop@db.example:5432 (alias 'default')",
    server_version="18.1",
    is_standby=False,
    clock_seconds=0.01,
    listens=True,
    position=1000,
    incarnation=0,
    waiting=Waiting(count=0, oldest_seconds=None),
    unseen=0,
    leader=Session(pid=17, name="web1:4711", address="10.0.0.1", since=AT),
    publisher="web1:4711",
    heartbeat_seconds=4.0,
    leading_since=AT,
    report={"listens": True, "grip_prefix": "", "proxies": {"http://proxy:5561": {}}},
    may_sequence=True,
    awake=False,
    proxies=[PROXY],
    pruning=Pruning(
        oldest_seconds=80_000.0, retention_seconds=86_400.0, ran_seconds=12.0, behind_seconds=0.0
    ),
    queue_usage=0.0,
    tables=[
        TableState(
            name="pg_eventstream_event",
            bytes=1 << 40,
            live_rows=5_000_000_000,
            dead_rows=1_000_000_000,
            last_vacuum=AT,
        )
    ],
)
NONE_LEADS: dict[str, Any] = {"leader": None, "awake": None}


def codes(**changes: Any) -> list[tuple[str, str]]:
    return [(finding.code, finding.level) for finding in judge(replace(HEALTHY, **changes))]


def held(seconds: float | None, transactions: int, kind: str = "session") -> OldestTransaction:
    return OldestTransaction(kind=kind, name="9 (x)", seconds=seconds, transactions=transactions)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"clock_seconds": -29}, []),
        ({"clock_seconds": -31}, [("clocks-differ", "degraded")]),
        ({"clock_seconds": 31}, [("clocks-differ", "degraded")]),
        # The heartbeat.
        ({"heartbeat_seconds": 29}, []),
        ({"heartbeat_seconds": 31}, [("publisher-silent", "broken")]),
        ({**NONE_LEADS, "heartbeat_seconds": 31}, [("publisher-gone", "broken")]),
        # A standby is about to take over.
        ({**NONE_LEADS, "standbys": [HEALTHY.leader]}, []),
        ({**NONE_LEADS, "standbys": [HEALTHY.leader], "heartbeat_seconds": 31},
         [("publisher-gone", "broken")]),
        # Through a pooler, the lock is held for moments.
        ({**NONE_LEADS, "report": {"listens": False}}, [("publisher-without-listen", "degraded")]),
        # Nothing needs a publisher.
        ({**NONE_LEADS, "publisher": None, "heartbeat_seconds": None, "report": {},
          "proxies": []}, []),
        ({**NONE_LEADS, "publisher": None, "heartbeat_seconds": None, "report": {}, "proxies": [],
          "waiting": Waiting(count=3, oldest_seconds=1e6)}, []),
        ({**NONE_LEADS, "publisher": None, "heartbeat_seconds": None, "report": {}, "proxies": [],
          "waiting": Waiting(count=3, oldest_seconds=31), "hubs": 1}, [("events-wait", "broken")]),
        # A proxy.
        ({"proxies": [replace(PROXY, lag_events=5, lag_seconds=29.0)]}, []),
        ({"proxies": [replace(PROXY, lag_events=5, lag_seconds=31.0)]}, [("proxy-late", "broken")]),
        ({"proxies": [replace(PROXY, lag_events=5, lag_seconds=31.0, trouble="answered 500")]},
         [("proxy-unreachable", "broken")]),
        # What waits to be put in order is late for every proxy.
        ({"waiting": Waiting(count=5, oldest_seconds=31),
          "proxies": [replace(PROXY, lag_events=5, lag_seconds=31.0)]},
         [("events-wait", "broken")]),
        ({"queue_usage": 0.1}, []),
        ({"queue_usage": 0.11}, [("queue-fills", "degraded")]),
        ({"queue_usage": 0.5}, [("queue-fills", "broken")]),
        # A held snapshot matters if there are dead rows, and it is old.
        ({"oldest_transaction": held(3599, 99_999)}, []),
        ({"oldest_transaction": held(3600, 5)}, [("vacuum-held-back", "degraded")]),
        ({"oldest_transaction": held(None, 100_000, "standby")},
         [("vacuum-held-back", "degraded")]),
        ({"oldest_transaction": held(1e6, 10**9), "tables": []}, []),
        ({"pruning": replace(HEALTHY.pruning, behind_seconds=1199.0)}, []),
        ({"pruning": replace(HEALTHY.pruning, behind_seconds=1201.0)},
         [("pruning-behind", "degraded")]),
        # Nothing else is said of a standby, or before all migrations are applied.
        ({"is_standby": True, **NONE_LEADS}, [("database-is-standby", "broken")]),
        ({**NONE_LEADS, "publisher": None,
          "problems": [Problem(id="pg_eventstream.I001", message="Tables.", hint="migrate")]},
         [("not-migrated", "broken")]),
        ({"problems": [Problem(id="pg_eventstream.W999", message="New.", hint=None)]},
         [("check-failed", "degraded")]),
        # Broken things come first.
        ({"clock_seconds": 99, "heartbeat_seconds": 99, "unseen": 3},
         [("publisher-silent", "broken"), ("unseen-events", "degraded"),
          ("clocks-differ", "degraded")]),
    ],
)  # fmt: skip
def test_findings_at_their_limits(changes: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    with override_settings(GRIP_PREFIX=""):
        assert codes(**changes) == expected


def test_name_of_a_transaction_is_quoted_in_the_advice() -> None:
    oldest = OldestTransaction(
        kind="prepared transaction", name="it's", seconds=9999.0, transactions=1
    )
    (finding,) = judge(replace(HEALTHY, oldest_transaction=oldest))
    assert "ROLLBACK PREPARED 'it''s';" in finding.remedy


def test_verdict_is_the_worst_level() -> None:
    def found(*levels: Any) -> list[Finding]:
        return [Finding(code="x", level=level, message="", remedy="") for level in levels]

    assert verdict([]) == "healthy"
    assert verdict(found("degraded")) == "degraded"
    assert verdict(found("degraded", "broken")) == "broken"


# Consumers

RUNNING = ConsumerState(
    name="stock",
    declared=True,
    declared_at="shop.event_consumers.update_stock",
    lag_events=3,
    lag_seconds=0.2,
    free_lag_seconds=0.2,
    position=997,
    unread_positions=3,
    processes=2,
    holders=[
        Holder(name="web1:7/a", slots=[*range(8)], heartbeat_seconds=9.0),
        Holder(name="web2:7/b", slots=[*range(8, 16)], heartbeat_seconds=2.0),
    ],
    heartbeat_seconds=9.0,
)
NOT_RUNNING: dict[str, Any] = {
    "processes": 0, "holders": [], "unheld_slots": [*range(16)], "heartbeat_seconds": None,
}  # fmt: skip
FAILING = TroubledSlot(slot=3, event="a:1", attempts=2, error="ValueError: x", retry_seconds=7.0)
STOPPED = replace(FAILING, retry_seconds=None)
WORKING = Working(event="a:1", holder="web1:7/a", seconds=44.0)
LATE: dict[str, Any] = {"lag_seconds": 61.0, "free_lag_seconds": 61.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        # Parts of a consumer's day.
        ({"lag_events": 0, "lag_seconds": 0.0, "free_lag_seconds": 0.0}, []),
        ({"lag_events": None, "lag_seconds": None, "free_lag_seconds": None}, []),
        ({"declared": None}, []),
        ({"declared": False}, []),  # a process of another version runs it
        ({"holders": [], "heartbeat_seconds": None, "unheld_slots": [*range(16)]}, []),  # begins
        ({"unheld_slots": [1, 2]}, []),  # a process has just ended
        ({**LATE, "replay_to": 2000}, []),
        ({**LATE, "free_lag_seconds": 59.0}, []),
        (LATE, ["consumer-lagging"]),
        ({**LATE, "lag_events": 4_000_000, "lag_is_estimate": True}, ["consumer-lagging"]),
        (NOT_RUNNING, ["consumer-not-running"]),
        ({**NOT_RUNNING, **LATE}, ["consumer-not-running"]),
        ({**NOT_RUNNING, "declared": None}, ["consumer-not-running"]),
        ({**NOT_RUNNING, "registered": False}, ["consumer-not-running"]),
        ({**NOT_RUNNING, "registered": False, "renamed_to": "x"}, ["consumer-not-running"]),
        ({**NOT_RUNNING, **LATE, "paused": True}, ["consumer-paused"]),
        ({"paused": True}, ["consumer-paused"]),
        ({**NOT_RUNNING, **LATE, "declared": False}, ["consumer-orphaned"]),
        ({"heartbeat_seconds": 31.0, **LATE}, ["consumer-silent"]),
        ({"heartbeat_seconds": 31.0, "working": WORKING}, ["consumer-silent"]),
        ({"heartbeat_seconds": 31.0, "timeout_seconds": 60.0}, []),
        ({"heartbeat_seconds": 91.0, "timeout_seconds": 60.0}, ["consumer-silent"]),
        ({"failing": [FAILING], "lag_seconds": 99.0}, ["consumer-failing"]),
        ({"failing": [FAILING, FAILING], **LATE}, ["consumer-failing", "consumer-lagging"]),
        ({"stopped": [STOPPED], "lag_seconds": 99.0}, ["consumer-stopped"]),
        ({"stopped": [replace(STOPPED, event=None)], "lost": 4}, ["consumer-stopped"]),
        ({"lost": 4}, ["consumer-stopped"]),
        ({"parked": 2}, ["events-parked"]),
        ({"parked": 2, "stopped": [STOPPED], "failing": [FAILING]},
         ["consumer-stopped", "consumer-failing", "events-parked"]),
        ({**NOT_RUNNING, "parked": 2, "failing": [FAILING]},
         ["consumer-not-running", "events-parked"]),
    ],
)  # fmt: skip
def test_findings_about_a_consumer(changes: dict[str, Any], expected: list[str]) -> None:
    state = replace(HEALTHY, consumers=[RUNNING, replace(RUNNING, **changes)])
    with override_settings(GRIP_PREFIX=""):
        found = judge(state)
    assert [finding.code for finding in found] == expected
    for finding in found:
        assert "None" not in finding.message + finding.remedy, finding
    assert_fits(render(state, found))


@pytest.mark.parametrize(
    ("settings", "days", "expected"),
    [
        ({}, 0.99, []),
        ({}, 1.1, [("consumer-holds-events", "degraded")]),
        ({}, 5.5, [("consumer-holds-events", "degraded")]),
        ({}, 5.7, [("consumer-holds-events", "broken")]),
        ({}, 8, [("consumer-holds-events", "broken")]),
        ({"EVENTSTREAM_RETENTION": None}, 8, []),
        ({"EVENTSTREAM_CONSUMER_HOLD": 3600}, 0.9, []),
        ({"EVENTSTREAM_CONSUMER_HOLD": 3600}, 1.1, [("consumer-holds-events", "broken")]),
    ],
)
def test_events_that_are_kept_for_a_consumer_alone_are_found(
    settings: dict[str, Any], days: float, expected: list[tuple[str, str]]
) -> None:
    rebuilt = replace(RUNNING, lag_seconds=days * 86_400, replay_to=2000)
    with override_settings(GRIP_PREFIX="", **settings):
        assert codes(consumers=[rebuilt]) == expected
        # What is lost already is said once.
        assert codes(consumers=[replace(rebuilt, lost=5)]) == [("consumer-stopped", "broken")]


def assert_fits(text: str) -> None:
    """In 80 columns, except for a command that is longer."""
    long = [line for line in text.splitlines() if len(line) > WIDTH]
    assert long == []


def test_consumers_whose_code_cannot_be_imported_are_found() -> None:
    assert codes(consumers_error="ImportError: x") == [("consumers-not-importable", "degraded")]


def test_events_that_only_consumers_put_in_order_wait() -> None:
    waiting = Waiting(count=5, oldest_seconds=31)
    without: dict[str, Any] = {
        **NONE_LEADS, "publisher": None, "heartbeat_seconds": None, "report": {}, "proxies": [],
    }  # fmt: skip
    assert codes(waiting=waiting, consumers=[replace(RUNNING, **NOT_RUNNING)], **without) == [
        ("consumer-not-running", "broken")
    ]
    assert codes(waiting=waiting, consumers=[RUNNING], **without) == [("events-wait", "broken")]


def test_screen_shows_consumers_in_a_line_each() -> None:
    busy = replace(
        RUNNING, name="a-projection-with-a-long-name", **LATE, lag_is_estimate=True, parked=10_000,
        failing=[FAILING], stopped=[STOPPED], paused=True, replay_to=123_456_789,
    )  # fmt: skip
    fresh = ConsumerState(name="new", registered=False, declared=True)
    text = render(replace(HEALTHY, consumers=[RUNNING, busy, fresh]), [])
    assert_fits(text)
    words = re.sub(r"\s+", " ", text)
    for line in (
        "Consumers stock: run by 2, heartbeat 9.0 s ago; 3 behind, 0.2 s",
        "a-projection-with-a-long-name: run by 2, heartbeat 9.0 s ago; paused; about 3 behind, 61"
        " s; handles again up to 123,456,789; slots that retry: 1; slots that have stopped: 1;"
        " parked: at least 10,000",
        "new: has never run",
    ):  # fmt: skip
        assert line in words, words


BROKEN = replace(
    HEALTHY,
    heartbeat_seconds=4711.0,
    awake=True,
    incarnation=123_456 * 10**12,
    waiting=Waiting(count=10_000, oldest_seconds=4711.0),
    unseen=1000,
    standbys=[HEALTHY.leader, HEALTHY.leader],  # type: ignore[list-item]
    proxies=[
        replace(
            PROXY,
            name="https://api.fastly.com/service/012345678901234567890123",
            lag_events=10_000_000,
            lag_seconds=4711.0,
            reachable=False,
            answer="answered 401: no such token - check iss and key in GRIP_URL",
            trouble="answered 401: no such token - check iss and key in GRIP_URL",
        )
    ],
    oldest_transaction=held(4711, 10**9),
    queue_usage=0.97,
    doctor={"ok": False, "findings": ["no-publisher", "buffering-proxy"]},
    doctor_seconds=300.0,
)


def test_screen_fits_into_80_columns_and_shows_what_is_wrong_first() -> None:
    text = render(BROKEN, judge(BROKEN))
    lines = text.splitlines()
    assert [line for line in lines if len(line) > WIDTH] == []
    assert "BROKEN" in lines[0]
    headings = [line for line in lines if re.match(r"(BROKEN|DEGRADED): ", line)]
    assert headings[0] == "BROKEN: publisher-silent"
    levels = [heading.split(":")[0] for heading in headings]
    assert levels == sorted(levels)  # broken before degraded
    assert len([line for line in lines if line.startswith("  To do: ")]) == len(headings)
    assert lines.index(headings[-1]) < next(
        n for n, line in enumerate(lines) if line.startswith("Database ")
    )


def test_colours_add_nothing_but_colour() -> None:
    def paint(kind: str, text: str) -> str:
        return f"<{kind}>{text}</>"

    for state in (HEALTHY, BROKEN):
        painted = render(state, judge(state), paint)
        assert re.sub(r"<[a-z]*>|</>", "", painted) == render(state, judge(state))
        assert f"<{verdict(judge(state))}>" in painted


def test_healthy_screen() -> None:
    text = render(HEALTHY, [])
    assert text.splitlines()[0].startswith("pg_eventstream ")
    for words in (
        ": HEALTHY ", "web1:4711 leads since 2026-11-27 12:00", "waiting to be put in order: none",
        "http://proxy:5561: answers; has acknowledged 1,000; nothing behind",
        "events are kept for 24 h; the oldest is 22 h old", "standing by: none",
        "nothing holds it back", "1.1 TB", "5,000,000,000 rows",
    ):  # fmt: skip
        assert words in re.sub(r"\s+", " ", text), words


def test_names_and_answers_do_not_control_the_terminal() -> None:
    hostile = "web\x1b]0;title\x07\x1b[2J\r\x9b31m:1"
    state = replace(
        BROKEN,
        publisher=hostile,
        leader=replace(HEALTHY.leader, name=hostile),  # type: ignore[type-var]
        proxies=[replace(PROXY, trouble=hostile, reachable=False, answer=hostile)],
    )
    text = render(state, judge(state))
    assert "web" in text
    assert all(c.isprintable() or c == "\n" for c in text)
