"""``eventstream_status`` names what is wrong with consumers, and finds nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pg_eventstream.operate import consumer_findings
from tests.support import consumer_breakages as broken
from tests.support.breakages import Environment
from tests.support.consumer_breakages import ONCE, STOCK, code, order, running, wait_for_slot
from tests.support.consumers import ConsumerProcess, declared
from tests.support.database import Database
from tests.support.status import status, status_with

Breakage = Callable[[Database], AbstractContextManager[Environment]]

#: What is broken; the finding and the exit status; what the message and the advice contain.
BREAKAGES: list[tuple[Breakage, str, int, str, str]] = [
    (broken.never_run, "consumer-not-running", 2,
     "'stock' has never run", "eventstream_consumers run"),
    (broken.killed, "consumer-not-running", 2,
     "is run by no process; 1 events wait for it", "eventstream_consumers run"),
    (broken.renamed, "consumer-not-running", 2,
     "which has the name 'store' now", "tests.support.handlers.obey.stock"),
    (broken.suspended, "consumer-silent", 2,
     "has shown no sign of life for 6", "Continue or restart it"),
    (broken.handler_hangs, "consumer-silent", 2,
     "has worked on the event orders:2 for", "give the consumer a timeout"),
    (broken.slow, "consumer-lagging", 1,
     "is 2 min behind; ", "--processes N"),
    (broken.retried, "consumer-failing", 1,
     "the event orders:2 (attempts: 1)", "eventstream_consumers skip stock ID"),
    (broken.stopped, "consumer-stopped", 2,
     "has stopped at the event orders:2 (1 of its slots): ValueError: no stock",
     "eventstream_consumers skip stock orders:2"),
    (broken.missed, "consumer-stopped", 2,
     "were pruned, up to position 1000000", "What the message says"),
    (broken.restored_from_a_backup, "consumer-stopped", 2,
     "it was emptied, restored or replaced", "What the message says"),
    (broken.parked, "events-parked", 1,
     "could not handle 1 events", "eventstream_consumers parked stock"),
    (broken.removed_from_the_code, "consumer-orphaned", 1,
     "No code here declares the consumer 'stock'", "eventstream_consumers remove stock"),
    (broken.paused, "consumer-paused", 1,
     "'stock' is paused", "eventstream_consumers resume stock"),
    (broken.paused_for_days, "consumer-holds-events", 1,
     "has not handled events that are 2 d old", "EVENTSTREAM_CONSUMER_HOLD"),
    (broken.code_does_not_import, "consumers-not-importable", 1,
     "missing 1 required positional argument: 'name'", "Correct the code"),
]  # fmt: skip

#: Findings that come with another, whose cause they are.
ALONG = {"consumer-holds-events": {"consumer-paused"}}


@pytest.mark.faults
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("breakage", "finding", "exit_code", "message", "remedy"),
    [pytest.param(*row, id=row[0].__name__) for row in BREAKAGES],
)
def test_breakage_of_a_consumer_is_diagnosed_by_name(
    database: Database, breakage: Breakage, finding: str, exit_code: int, message: str, remedy: str
) -> None:
    level = {1: "degraded", 2: "broken"}[exit_code]
    with breakage(database) as environment:
        found_exit_code, found = status_with(environment, finding, level, timeout=60)
    assert (found_exit_code, found["verdict"]) == (exit_code, level), found
    (one,) = (one for one in found["findings"] if one["code"] == finding)
    assert message in one["message"], found
    assert remedy in one["remedy"], found
    others = {one["code"] for one in found["findings"]} - {finding}
    assert others == ALONG.get(finding, set()), found


def test_each_of_several_consumers_is_judged(database: Database) -> None:
    """A short form of the table, with several at once."""
    stops = {**STOCK, "name": "stops", "retry": ONCE, "on_failure": "stop"}
    parks = {**STOCK, "name": "parks", "retry": ONCE}
    with running(database, stops, parks) as process:
        order(database, fail="no stock")
        process.wait_for_log("is parked")
        wait_for_slot(database, "stopped")
        exit_code, found = status(code(stops, parks, {**STOCK, "name": "never"}))
    assert exit_code == 2
    assert [(one["code"], one["message"].split("'")[1]) for one in found["findings"]] == [
        ("consumer-not-running", "never"),
        ("consumer-stopped", "stops"),
        ("events-parked", "parks"),
    ]
    states = {one["name"]: one for one in found["state"]["consumers"]}
    assert states["parks"]["parked"] == 1
    assert states["stops"]["stopped"][0]["event"] == "orders:2"


@pytest.mark.faults
@pytest.mark.thorough
def test_processes_that_follow_each_other_in_a_deploy_are_healthy(database: Database) -> None:
    with running(database, STOCK), ConsumerProcess(environment=declared(STOCK)):
        assert status(code(STOCK))[0] == 0
    with ConsumerProcess(environment=declared(STOCK)):
        database.send("another")
        exit_code, found = status(code(STOCK))
    assert (exit_code, found["findings"]) == (0, [])
    (state,) = found["state"]["consumers"]
    assert (state["processes"], state["lag_events"], state["declared"]) == (1, 0, True)


def test_every_finding_about_consumers_is_provoked() -> None:
    source = Path(consumer_findings.__file__).read_text(encoding="utf-8")
    assert {*re.findall(r'code="([a-z-]+)"', source)} == {row[1] for row in BREAKAGES}
