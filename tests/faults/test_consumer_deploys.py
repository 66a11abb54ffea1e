"""Old and new code run at once, and consumers are renamed and removed beneath running processes."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from pg_eventstream import send_event, send_events
from pg_eventstream.consumers import operations
from pg_eventstream.errors import OperationRefused
from pg_eventstream.servers.processes import children, wait_until
from tests.support.consumers import ConsumerProcess, Handled, declared
from tests.support.database import Database

pytestmark = [pytest.mark.faults]

CHANNELS = 24


def code(*names: str, **options: Any) -> dict[str, str]:
    """The environment of a process whose code declares consumers of these names."""
    return declared(
        *({"name": name, "handler": "record", "start": "earliest", **options} for name in names)
    )


def send(count: int) -> None:
    send_events([(f"c{n % CHANNELS}", "message", n) for n in range(count)])


def kill_a_child(process: ConsumerProcess) -> None:
    """Its parent starts another."""
    before = process.log.count("starting another")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    wait_until(lambda: process.log.count("starting another") > before, timeout=30)


def check_once_in_order(database: Database, total: int, *names: str) -> None:
    """All events were handled once, in order, by these consumers together."""
    rows = database.fetch(
        "SELECT channel, eid FROM handled WHERE consumer = ANY(%s) ORDER BY nth", [list(names)]
    )
    assert len(rows) == len({*rows}) == total
    for channel in {channel for channel, _ in rows}:
        eids = [eid for its, eid in rows if its == channel]
        assert eids == [*range(1, len(eids) + 1)], channel


@pytest.mark.thorough
def test_two_versions_of_the_code_share_the_work(database: Database, handled: Handled) -> None:
    """While both run, and while one of them stops; their declarations differ, too."""
    send(300)
    with ConsumerProcess(environment=code("stock")):
        handled.wait("stock", 100)
        with ConsumerProcess("--processes", "2", environment=code("stock", batch=7)) as new:
            send(300)
            handled.wait("stock", 400)
            send(300)
            wait_until(lambda: database.value(
                "SELECT count(DISTINCT holder) FROM pg_eventstream_slot") == 3, timeout=30,
            )  # fmt: skip
            kill_a_child(new)
            send(300)
        send(100)
        handled.wait("stock", 1300)
    check_once_in_order(database, 1300, "stock")


def test_removed_consumer_does_not_come_back(database: Database, handled: Handled) -> None:
    """In processes whose code still declares it, and in those that replace them."""
    send(50)
    with ConsumerProcess("--processes", "2", environment=code("other", "stock")) as old:
        handled.wait("stock", 50)
        handled.wait("other", 50)
        operations.remove("default", "stock")
        old.wait_for_log("consumer stock: it was removed; stopped here")
        kill_a_child(old)
        old.wait_for_log("The consumer 'stock' was removed while processes ran it.")
        send(50)
        handled.wait("other", 100)
        assert old.log.count("starting another") == 1
    assert handled.count("stock") == 50
    assert database.fetch("SELECT name FROM pg_eventstream_consumer") == [("other",)]
    check_once_in_order(database, 100, "other")


@pytest.mark.thorough
def test_renamed_consumer_goes_on_in_the_new_code(database: Database, handled: Handled) -> None:
    send(50)
    with ConsumerProcess("--processes", "2", environment=code("other", "stock")) as old:
        handled.wait("stock", 50)
        operations.rename("default", "stock", "goods")
        send(50)
        old.wait_for_log("consumer stock: it was renamed to 'goods'; this is the code from before")
        kill_a_child(old)
        old.wait_for_log("The consumer 'stock' was renamed to 'goods'. Rename it in the code, too")
        with ConsumerProcess(environment=code("other", "goods")):
            send(50)
            handled.wait("goods", 100)
            handled.wait("other", 150)
            # The deploy is rolled back.
            operations.rename("default", "goods", "stock")
            send(50)
        with ConsumerProcess(environment=code("other", "stock")):
            handled.wait("stock", 100)
            handled.wait("other", 200)
        assert old.log.count("starting another") == 1
    check_once_in_order(database, 200, "stock", "goods")
    check_once_in_order(database, 200, "other")


@pytest.mark.thorough
def test_process_with_nothing_left_to_run_says_why(database: Database, handled: Handled) -> None:
    with ConsumerProcess(environment=code("stock")):
        operations.rename("default", "stock", "goods")
        refused = ConsumerProcess(environment=code("stock"))
        refused.start()
        assert refused.wait(timeout=30) == 1
        refused.kill()
        assert refused.log.count("The consumer 'stock' was renamed to 'goods'.") >= 1
        assert "starting another" not in refused.log
        assert "Traceback" not in refused.log


@pytest.mark.thorough
def test_new_code_that_runs_before_the_rename_can_be_put_right(
    database: Database, handled: Handled
) -> None:
    send(50)
    with ConsumerProcess(environment=code("stock")):
        handled.wait("stock", 50)
    with (
        ConsumerProcess(environment=code("goods", start="latest")),
        pytest.raises(OperationRefused, match="has run too early, stop it, and"),
    ):
        operations.rename("default", "stock", "goods")
    operations.remove("default", "goods")
    operations.rename("default", "stock", "goods")
    send_event("c0", "message", 1)
    with ConsumerProcess(environment=code("goods")):
        handled.wait("goods", 1)
    check_once_in_order(database, 51, "stock", "goods")


@pytest.mark.thorough
@pytest.mark.parametrize("operation", ["pause", "reset", "rename", "remove"])
@pytest.mark.parametrize("seed", range(10))
def test_operations_while_processes_work_lose_nothing(
    database: Database, handled: Handled, operation: str, seed: int
) -> None:
    """An operation in the middle of the work, with two processes that hold slots."""
    send(200)
    environment = code("stock", batch=1 + seed % 5)
    with ConsumerProcess("--processes", "2", environment=environment):
        handled.wait("stock", 20 + seed * 10)
        match operation:
            case "pause":
                operations.pause("default", "stock")
                count = handled.count("stock")
                send(10)
                assert handled.count("stock") == count
                operations.resume("default", "stock")
            case "reset":
                operations.reset("default", "stock", "earliest")
                # What was handled again by now is more than this needs to keep.
                database.execute("DELETE FROM handled WHERE NOT replayed")
            case "rename":
                operations.rename("default", "stock", "goods")
                operations.rename("default", "goods", "stock")
            case "remove":
                operations.remove("default", "stock")
                database.execute("DELETE FROM handled")
    with ConsumerProcess(environment=environment):
        if operation == "reset":
            # Events that had not been handled are not replayed, and some of them are deleted.
            handled.wait("stock", database.value("SELECT count(*) FROM handled"))
            lowest = "SELECT min(position) FROM pg_eventstream_checkpoint"
            wait_until(lambda: database.value(lowest) == 200, timeout=60)
            rows = database.fetch("SELECT channel, eid FROM handled WHERE replayed ORDER BY nth")
            assert len(rows) == len({*rows}) >= 20 + seed * 10
            return
        total = 210 if operation == "pause" else 200
        handled.wait("stock", total)
    check_once_in_order(database, total, "stock")
