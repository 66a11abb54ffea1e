"""Parked events are tried again, or given up, when a person says so."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection, transaction

from pg_eventstream import send_event, send_events
from pg_eventstream.consumers import Consumer, Retry, consumer, operations
from pg_eventstream.consumers.handling import raw_connection
from pg_eventstream.consumers.trouble import Parked, find_consumer, list_failing, list_parked
from pg_eventstream.errors import ConsumerBusy, ConsumerStopped, OperationRefused
from pg_eventstream.limits import Limits
from pg_eventstream.servers.processes import wait_until
from tests.support.consumers import (
    ConsumerProcess,
    Handled,
    declared,
    handle_all,
    running_worker,
)
from tests.support.database import Database
from tests.support.handlers import named, obey


def make(**options: Any) -> Consumer:
    return consumer("stock", **{"start": "earliest", "retry": Retry(1), **options})(
        named(obey, "stock")
    )


def parked() -> list[Parked]:
    with transaction.atomic():
        here = raw_connection("default")
        return list_parked(here, find_consumer(here, "stock"), content="all")


def ids() -> list[str]:
    return [event.id for event in parked()]


def retry(*events: str) -> int:
    return operations.retry("default", "stock", events or None)


def skip(event: str) -> operations.Skipped:
    return operations.skip("default", "stock", event)


def poison(until: int = 2, **order: Any) -> dict[str, Any]:
    return {"fail": "x", "until_attempt": until, **order}


def test_events_are_named_by_id_or_position(database: Database, handled: Handled) -> None:
    stock = make()
    long = "o" * 200
    send_events([("a", "m", poison()), ("b c:d", "m", poison()), (long, "m", poison())])
    send_event("a", "m", poison())
    handle_all(stock)
    names = ids()
    assert names[:2] == ["a:1", "b%20c%3Ad:1"]
    assert "o" not in names[2]
    assert retry("2") == 1
    assert retry(names[2], names[2], "a:2") == 2
    assert [event.retry for event in parked()] == [False, True, True, True]
    for wrong in ("a:3", "b:1", "a", "error", "9", "%7Eabc:1"):
        with pytest.raises(OperationRefused, match=r"has not parked .*Parked are: a:1, b%20c"):
            retry("a:1", wrong)
    assert [event.retry for event in parked()] == [False, True, True, True]
    handle_all(stock)
    assert ids() == ["a:1"]
    assert handled.eids("stock") == {"b c:d": [1], long: [1], "a": [2]}
    assert retry() == 1
    handle_all(stock)
    assert ids() == []
    assert retry() == 0


@pytest.mark.faults
@pytest.mark.thorough
def test_all_parked_events_are_tried_however_many(database: Database, handled: Handled) -> None:
    stock = make(batch=100)
    send_event("orders", "m", poison())
    handle_all(stock)
    database.execute(
        "INSERT INTO pg_eventstream_parked (consumer_id, slot, position, channel, number, type,"
        " data, created, error, traceback, attempts) SELECT consumer_id, slot, -n, channel, n + 1,"
        " type, data, created, error, traceback, attempts FROM pg_eventstream_parked,"
        " generate_series(1, 249) AS n"
    )
    assert retry() == 250
    handle_all(stock)
    assert ids() == []
    assert handled.count("stock") == 250


def test_last_attempt_is_the_last(
    database: Database, handled: Handled, caplog: pytest.LogCaptureFixture
) -> None:
    stock = make(retry=Retry(2, backoff=0))
    send_events([("orders", "m", poison(3)), ("orders", "m", 2)])
    handle_all(stock)
    assert caplog.text.count("event orders:1: attempt 1 of 2 failed") == 1
    assert caplog.text.count("event orders:1: attempt 2 of 2 failed") == 1
    assert caplog.text.count("event orders:1 is parked") == 1
    assert (ids(), handled.eids("stock")) == (["orders:1"], {"orders": [2]})


def test_event_that_fails_again_stays_parked(database: Database, handled: Handled) -> None:
    stock = make()
    send_events([("orders", "m", poison(4)), ("orders", "m", 2)])
    handle_all(stock)
    for attempts in (2, 3):
        retry("orders:1")
        handle_all(stock)
        [event] = parked()
        assert (event.attempts, event.retry) == (attempts, False)
        assert "ValueError: x" in event.traceback
    retry("orders:1")
    handle_all(stock)
    assert (ids(), handled.eids("stock")) == ([], {"orders": [2, 1]})


@pytest.mark.faults
@pytest.mark.thorough
def test_event_that_kills_the_process_stays_parked(database: Database, handled: Handled) -> None:
    """It is not tried again by the process that takes over, and no other event suffers."""
    send_events([("orders", "m", {"kill": 1, "until_attempt": 5}), ("orders", "m", 2)])
    environment = declared(
        {"name": "stock", "handler": "obey", "start": "earliest", "retry": {"attempts": 2}}
    )
    with ConsumerProcess(environment=environment) as process:
        handled.wait("stock", 1)
        assert ids() == ["orders:1"]
        before = parked()[0].attempts
        send = "ended with status -9; starting another"
        deaths = process.log.count(send)
        retry("orders:1")
        wait_until(lambda: process.log.count(send) > deaths, timeout=30)
        send_event("orders", "m", 3)
        handled.wait("stock", 2)
        [event] = parked()
        assert (event.attempts, event.retry) == (before + 1, False)
        assert process.log.count(send) == deaths + 1
    assert handled.eids("stock") == {"orders": [2, 3]}
    attempts = database.fetch("SELECT attempt FROM handled ORDER BY nth")
    assert attempts[0] == (1,)


@pytest.mark.faults
@pytest.mark.thorough
def test_retry_that_kills_is_not_blamed_on_the_next_event(
    database: Database, handled: Handled
) -> None:
    send_events([("orders", "m", {"kill": 1, "until_attempt": 9}), ("orders", "m", poison(2))])
    environment = declared(
        {"name": "stock", "handler": "obey", "start": "earliest",
         "retry": {"attempts": 2, "backoff": 8}}
    )  # fmt: skip
    with ConsumerProcess(environment=environment) as process:
        process.wait_for_log("event orders:2: attempt 1 of 2 failed")
        assert ids() == ["orders:1"]
        deaths = process.log.count("starting another")
        retry("orders:1")
        wait_until(lambda: process.log.count("starting another") > deaths, timeout=30)
        handled.wait("stock", 1)
    assert ids() == ["orders:1"]
    assert handled.eids("stock") == {"orders": [2]}


@pytest.mark.faults
@pytest.mark.thorough
def test_retry_that_hangs_is_ended(database: Database, handled: Handled) -> None:
    send_events([("orders", "m", poison(2)), ("orders", "m", 2)])
    environment = declared(
        {"name": "stock", "handler": "obey", "start": "earliest", "retry": {"attempts": 1},
         "timeout": 0.5}
    )  # fmt: skip
    with ConsumerProcess(environment=environment) as process:
        handled.wait("stock", 1)
        database.execute("UPDATE pg_eventstream_parked SET data = '{\"sleep\": 60}'")
        retry("orders:1")
        process.wait_for_log("orders:1: its handler has not returned after 0.5 seconds")
        send_event("orders", "m", 3)
        handled.wait("stock", 2)
    [event] = parked()
    assert (event.attempts, event.retry) == (2, False)
    assert "had not returned after 0.5 seconds" in event.error
    assert handled.eids("stock") == {"orders": [2, 3]}


def test_retry_waits_while_the_consumer_is_paused(database: Database, handled: Handled) -> None:
    stock = make()
    send_events([("orders", "m", poison())])
    handle_all(stock)
    operations.pause("default", "stock")
    retry()
    with running_worker(stock):
        wait_until(lambda: database.value("SELECT bool_and(holder <> '') FROM pg_eventstream_slot"),
                   timeout=10)  # fmt: skip
        handle_nothing = database.value("SELECT pg_notify('pg_eventstream_consumers', '')")
        assert handle_nothing in ("", None)
        assert ids() == ["orders:1"]
        operations.resume("default", "stock")
        handled.wait("stock", 1)
    assert ids() == []


def test_request_survives_a_change_at_the_same_moment(database: Database, handled: Handled) -> None:
    """A process that has lost its slot meanwhile leaves the request to whoever has it."""
    stock = make()
    send_events([("orders", "m", poison())])
    handle_all(stock)
    with running_worker(stock):
        wait_until(lambda: database.value("SELECT bool_and(holder <> '') FROM pg_eventstream_slot"),
                   timeout=10)  # fmt: skip
        with transaction.atomic():
            retry()
            operations.reset("default", "stock", "latest")
        handled.wait("stock", 1)
    assert ids() == []


def test_retry_keeps_the_order_of_a_channel(database: Database, handled: Handled) -> None:
    stock = make(on_failure="park-channel")
    send_events([("a", "m", poison(3)), ("a", "m", 2), ("b", "m", 1), ("a", "m", 3)])
    handle_all(stock)
    assert ids() == ["a:1", "a:2", "a:3"]
    for wrong in (["a:2"], ["a:2", "a:3"], ["a:3", "a:1"]):
        with pytest.raises(OperationRefused, match=r"a:[23] has to wait for a:[12], which is park"):
            retry(*wrong)
    # It fails again, so the others wait for it.
    retry("a:2", "a:1", "a:3")
    handle_all(stock)
    assert [(event.id, event.retry) for event in parked()] == [
        ("a:1", False), ("a:2", False), ("a:3", False)]  # fmt: skip
    # As older code, or SQL, could ask.
    database.execute("UPDATE pg_eventstream_parked SET retry = true WHERE number > 1")
    handle_all(stock)
    assert ids() == ["a:1", "a:2", "a:3"]
    send_event("a", "m", 4)
    handle_all(stock)
    assert ids() == ["a:1", "a:2", "a:3", "a:4"]
    retry("a:1", "a:2")
    handle_all(stock)
    assert ids() == ["a:3", "a:4"]
    assert retry("a:3") == 1
    assert retry("a:4") == 1
    handle_all(stock)
    send_event("a", "m", 5)
    handle_all(stock)
    assert handled.eids("stock") == {"b": [1], "a": [1, 2, 3, 4, 5]}


def test_skipped_event_lets_its_channel_go_on(database: Database, handled: Handled) -> None:
    stock = make(on_failure="park-channel")
    send_events([("a", "m", poison(9)), ("a", "m", 2)])
    with running_worker(stock):
        wait_until(lambda: len(parked_in(database)) == 2, timeout=10)
        assert skip("a:1") == operations.Skipped("a:1", was_parked=True)
        assert retry("a:2") == 1
        handled.wait("stock", 1)
        send_event("a", "m", 3)
        handled.wait("stock", 2)
    assert handled.eids("stock") == {"a": [2, 3]}
    assert ids() == []


def parked_in(database: Database) -> list[tuple[Any, ...]]:
    return database.fetch("SELECT channel FROM pg_eventstream_parked")


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(False, marks=[pytest.mark.faults, pytest.mark.thorough]),
        True,
    ],
    ids=["no process", "a process"],
)
def test_skip_where_it_has_stopped(database: Database, handled: Handled, runs: bool) -> None:
    stock = make(on_failure="stop")
    send_events([("a", "m", 1), ("a", "m", poison(9)), ("a", "m", 3)])
    with pytest.raises(ConsumerStopped):
        handle_all(stock)
    [failing] = list_failing(raw_connection("default"), find_consumer(raw_connection("default"),
                                                                      "stock"))  # fmt: skip
    assert (failing.id, failing.stopped) == ("a:2", True)
    for wrong in ("a:1", "a:3", "7"):
        with pytest.raises(OperationRefused, match="Events to skip: a:2"):
            skip(wrong)
    if runs:
        with running_worker(stock):
            skip("a:2")
            handled.wait("stock", 2)
    else:
        skip("2")
        handle_all(stock)
    assert handled.eids("stock") == {"a": [1, 3]}
    with pytest.raises(OperationRefused, match="Events to skip: none"):
        skip("a:2")


def test_skip_while_it_waits_for_the_next_attempt(database: Database, handled: Handled) -> None:
    stock = make(retry=Retry(5, backoff=600, longest=600))
    send_events([("a", "m", poison(9)), ("a", "m", 2)])
    with running_worker(stock):
        wait_until(lambda: database.value("SELECT max(attempts) FROM pg_eventstream_slot") == 1,
                   timeout=10)  # fmt: skip
        skip("a:1")
        handled.wait("stock", 1)
    assert handled.eids("stock") == {"a": [2]}


def test_resume_tries_again_where_it_has_stopped(database: Database, handled: Handled) -> None:
    stock = make(on_failure="stop", retry=Retry(2, backoff=0))
    send_events([("a", "m", {"sql": "SELECT 1 / (SELECT count(*) FROM mended)"}), ("a", "m", 2)])
    database.execute("CREATE TABLE mended (n int)")
    with pytest.raises(ConsumerStopped, match="has stopped"):
        handle_all(stock)
    assert operations.resume("default", "stock") == operations.Resumed(False, 1)
    with pytest.raises(ConsumerStopped, match="has stopped"):
        handle_all(stock)
    assert database.value("SELECT max(attempts) FROM pg_eventstream_slot") == 2
    database.execute("INSERT INTO mended VALUES (1)")
    operations.resume("default", "stock")
    handle_all(stock)
    assert handled.eids("stock") == {"a": [1, 2]}


def test_failure_from_before_a_reset_is_not_written_down(
    database: Database, handled: Handled
) -> None:
    """The handler fails after the reset; the slot must not stop at a place where it is not."""
    stock = make(on_failure="stop")
    send_event("a", "m", {"sql": "DO 'BEGIN PERFORM pg_advisory_xact_lock(1); RAISE ''x''; END'"})
    with database.connect() as other:
        other.execute("SELECT pg_advisory_lock(1)")
        with running_worker(stock):
            wait_until(lambda: database.value(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'") == 1,
                timeout=10)  # fmt: skip
            with pytest.raises(ConsumerBusy, match="has worked on the event a:1 for"):
                operations.reset("default", "stock", "latest", Limits(command_patience=0.2))
            database.execute(
                "UPDATE pg_eventstream_consumer SET epoch = 7"  # as a reset that came first
            )
            other.execute("SELECT pg_advisory_unlock(1)")
            wait_until(lambda: database.value("SELECT bool_and(holder <> '') FROM"
                                              " pg_eventstream_slot"), timeout=10)  # fmt: skip
            database.execute("UPDATE pg_eventstream_checkpoint SET epoch = 7, position = 1")
            send_event("a", "m", 2)
            handled.wait("stock", 1)
    assert handled.eids("stock") == {"a": [2]}
    assert database.value("SELECT count(*) FROM pg_eventstream_slot WHERE stopped") == 0


def test_busy_names_the_parked_event(database: Database, handled: Handled) -> None:
    stock = make()
    send_event("a", "m", poison())
    handle_all(stock)
    database.execute(
        'UPDATE pg_eventstream_parked SET data = \'{"sql": "SELECT pg_advisory_xact_lock(1)"}\''
    )
    with database.connect() as other, running_worker(stock):
        other.execute("SELECT pg_advisory_lock(1)")
        retry()
        wait_until(lambda: database.value(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'") == 1,
            timeout=10)  # fmt: skip
        with pytest.raises(ConsumerBusy, match="has worked on the parked event a:1 for"):
            operations.skip("default", "stock", "a:1", Limits(command_patience=0.2))
        other.execute("SELECT pg_advisory_unlock(1)")
        handled.wait("stock", 1)
    connection.close()
