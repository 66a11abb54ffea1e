"""Consumers handle each event once, in the order of its channel."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.db.transaction import TransactionManagementError
from django.test import override_settings
from psycopg import IsolationLevel

from pg_eventstream import permission, send_event, send_events
from pg_eventstream.consumers import ConsumedEvent, consumer, upcast
from tests.support.consumers import ConsumerProcess, Handled, declared, recorder
from tests.support.database import Database
from tests.support.handlers import record


def test_drain_handles_what_is_committed_once_and_in_order(handled: Handled) -> None:
    stock = recorder("stock", channels=["orders"], prefixes=["returns-"])
    send_events([("orders", "placed", n) for n in range(5)])
    send_events([(f"returns-{n}", "returned", n) for n in range(3)])
    send_event("other", "message", 1)
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        send_event("orders", "placed", "rolled back")
        _ = 1 / 0
    assert stock.drain() == 8
    assert handled.eids("stock") == {
        "orders": [1, 2, 3, 4, 5],
        "returns-0": [1],
        "returns-1": [1],
        "returns-2": [1],
    }
    assert stock.drain() == 0
    send_event("orders", "placed", 6)
    assert stock.drain() == 1
    assert handled.eids("stock")["orders"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_processes_handle_everything_once_in_order(
    database: Database, handled: Handled, batch: int
) -> None:
    send_events([(f"c{n % 40}", "message", n) for n in range(600)])
    environment = declared(
        {"name": "all", "handler": "record", "start": "earliest", "batch": batch}
    )
    process = ConsumerProcess("--processes", "3", environment=environment)
    with process:
        handled.wait("all", 600)
        for n in range(100):
            send_event(f"c{n % 40}", "message", n)
        handled.wait("all", 700)
    assert handled.eids("all") == {
        f"c{c}": [*range(1, 15 + (3 if c < 20 else 2) + 1)] for c in range(40)
    }


# Which events


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"orders", "orders-1", "Orders", "a*", "ünï", "%", "_"}),
        ({"channels": ["orders", "a*"]}, {"orders", "a*"}),
        ({"prefixes": ["orders"]}, {"orders", "orders-1"}),
        ({"channels": ["ünï"], "prefixes": ["%", "ord"]}, {"ünï", "%", "orders", "orders-1"}),
        ({"channels": ["none"]}, set()),
    ],
)
def test_channels_and_prefixes(
    handled: Handled, options: dict[str, Any], expected: set[str]
) -> None:
    names = ["orders", "orders-1", "Orders", "a*", "ünï", "%", "_", "volatile-orders"]
    send_events([(name, "message", 1) for name in names])
    permission.channel_permission_changed(None, "orders")
    with override_settings(
        EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Volatile"
    ):
        recorder("stock", **options).drain()
    assert set(handled.eids("stock")) == expected


@pytest.mark.parametrize(("start", "expected"), [("earliest", [1, 2, 3]), ("latest", [3])])
def test_start(database: Database, handled: Handled, start: str, expected: list[int]) -> None:
    send_events([("c", "message", n) for n in range(2)])
    database.execute("SELECT pg_eventstream_sequence()")
    stock = recorder("stock", start=start)
    stock.drain()
    send_event("c", "message", 3)
    stock.drain()
    assert handled.eids("stock") == {"c": expected}


def test_event_as_it_was_sent(handled: Handled) -> None:
    events: list[ConsumedEvent] = []
    keep = consumer("keep", start="earliest")(events.append)
    data = [{"ü": "\U0001f389"}, "x" * 1_000_000, None]
    send_events([("c", "placed", value, None, True, {"version": 2, "by": 7}) for value in data])
    send_event("c", "message", "not JSON", json_encode=False)
    assert keep.drain() == 4
    assert [event.json() for event in events[:3]] == data
    assert [event.data for event in events[3:]] == ["not JSON"]
    assert [event.eid for event in events] == [1, 2, 3, 4]
    assert [event.id for event in events] == ["c:1", "c:2", "c:3", "c:4"]
    assert [event.meta for event in events] == [*[{"version": 2, "by": 7}] * 3, None]
    assert [event.version for event in events] == [2, 2, 2, 1]
    first = events[0]
    assert first.committed_at is not None
    assert first.created <= first.committed_at
    assert (first.replayed, first.attempt, first.type) == (False, 1, "placed")


def test_old_versions_are_converted_when_they_are_read(handled: Handled) -> None:
    values: list[Any] = []
    keep = consumer("keep", start="earliest")(lambda event: values.append(event.json()))

    @upcast("placed-here", from_version=1)
    def add_currency(data: Any) -> Any:
        return {**data, "currency": "EUR"}

    @upcast("placed-here", from_version=2)
    def count_cents(data: Any) -> Any:
        return {"cents": data["price"] * 100, "currency": data["currency"]}

    send_event("c", "placed-here", {"price": 2})
    send_event("c", "placed-here", {"price": 3, "currency": "CHF"}, meta={"version": 2})
    send_event("c", "placed-here", {"cents": 5, "currency": "CHF"}, meta={"version": 3})
    send_event("c", "other", {"price": 2})
    keep.drain()
    assert values == [
        {"cents": 200, "currency": "EUR"},
        {"cents": 300, "currency": "CHF"},
        {"cents": 5, "currency": "CHF"},
        {"price": 2},
    ]


# Waiting


def test_wait_returns_once_everything_committed_before_is_handled(
    database: Database, handled: Handled
) -> None:
    stock = recorder("stock", channels=["orders"])
    assert not stock.wait(timeout=0.05)  # it has never run
    environment = declared(
        {"name": "stock", "handler": "record", "start": "earliest", "channels": ["orders"]}
    )
    with ConsumerProcess(environment=environment):
        for n in range(30):
            send_event("orders", "message", n)
            assert stock.wait(timeout=20)
            assert handled.count("stock") == n + 1
            send_event("other", "message", n)  # nothing to be handled
            assert stock.wait(timeout=20)
        # A transaction that is open all the time makes nobody wait.
        with database.connect(autocommit=False) as other:
            other.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('orders', '1')")
            send_event("orders", "message", 30)
            assert stock.wait(timeout=20)
            assert handled.count("stock") == 31
        assert stock.wait(timeout=20)
        assert handled.count("stock") == 32
    send_event("orders", "message", 31)
    assert not stock.wait(timeout=0.1)


def test_wait_and_drain_refuse_what_is_not_committed(handled: Handled) -> None:
    stock = recorder("stock")
    for call in (lambda: stock.wait(timeout=1), stock.drain):
        with pytest.raises(TransactionManagementError, match="committed"), transaction.atomic():
            call()


def test_drain_raises_what_the_handler_raises_and_counts_no_attempt(
    database: Database, handled: Handled
) -> None:
    broken = True

    @consumer("stock", start="earliest")
    def stock(event: ConsumedEvent) -> None:
        if broken and event.eid == 2:
            raise ValueError("broken")
        record(event, "stock")

    send_events([("c", "message", n) for n in range(3)])
    for _ in range(3):
        with pytest.raises(ValueError, match="broken"):
            stock.drain()
    assert handled.eids("stock") == {"c": [1]}
    broken = False
    assert stock.drain() == 2
    assert database.fetch("SELECT attempt FROM handled") == [(1,)] * 3


# The race that other consumers lose


def test_event_that_is_inserted_first_and_committed_last_is_not_skipped(
    database: Database, handled: Handled
) -> None:
    """A consumer that remembers the highest id skips it, which this shows, too."""
    stock = recorder("stock")
    by_id: list[str] = []
    highest = 0

    def poll() -> None:
        nonlocal highest
        for event_id, data in database.fetch(
            "SELECT id, data FROM pg_eventstream_event WHERE id > %s ORDER BY id", [highest]
        ):
            highest = event_id
            by_id.append(data)

    insert = "INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', %s)"
    with database.connect(autocommit=False) as always, database.connect(autocommit=False) as late:
        always.execute(insert, ["never committed"])
        for n in range(10):
            late.execute(insert, [f"late {n}"])
            database.execute(insert, [f"early {n}"])
            poll()
            stock.drain()  # nor does it wait
            assert handled.count("stock") == 2 * n + 1
            late.commit()
            poll()
            stock.drain()
        always.rollback()
    data = [data for (data,) in database.fetch("SELECT data FROM handled ORDER BY nth")]
    assert data == [f"{when} {n}" for n in range(10) for when in ("early", "late")]
    assert by_id == [f"early {n}" for n in range(10)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize("batch", [1, 3])
def test_drain_that_is_interrupted_skips_nothing(
    handled: Handled, error: type[BaseException], batch: int
) -> None:
    interrupts = [2, 4, 4, 7]

    @consumer("stock", channels=["orders"], start="earliest", batch=batch)
    def stock(event: ConsumedEvent) -> None:
        record(event, "stock")
        if interrupts and event.eid == interrupts[0]:
            interrupts.pop(0)
            raise error

    send_events([("orders", "placed", n) for n in range(7)])
    for _ in range(4):
        with pytest.raises(error):
            stock.drain()
    stock.drain()
    assert handled.eids("stock") == {"orders": [*range(1, 8)]}


def test_drain_leaves_other_connections_of_the_program_alone(
    database: Database, handled: Handled
) -> None:
    stock = recorder("stock")
    connections.settings["other"] = dict(connections.settings["default"])
    try:
        transaction.set_autocommit(False, "other")
        send_event("orders", "placed", 1, using="other")
        send_event("orders", "placed", 2)
        assert stock.drain() == 1
        transaction.commit("other")
        assert stock.drain() == 1
    finally:
        connections["other"].close()
        del connections.settings["other"], connections["other"]
    assert handled.eids("stock") == {"orders": [1, 2]}


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize("batch", [1, 10])
def test_handler_runs_in_the_isolation_level_of_the_connection(batch: int) -> None:
    def look(event: ConsumedEvent) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SHOW transaction_isolation")
            levels.append(cursor.fetchone()[0])

    levels: list[str] = []
    levelled = consumer("levelled", start="earliest", batch=batch)(look)
    send_events([("c", "message", n) for n in range(2)])
    connection.ensure_connection()
    connection.connection.isolation_level = IsolationLevel.REPEATABLE_READ
    try:
        assert levelled.drain() == 2
    finally:
        connection.close()
    assert levels == ["repeatable read"] * 2
