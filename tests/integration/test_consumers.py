"""Consumers handle each event once, in the order of its channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import transaction

from pg_eventstream import send_event, send_events
from pg_eventstream.consumers import consumer, declare
from tests.support.consumers import ConsumerProcess, Handled, declared
from tests.support.database import Database
from tests.support.handlers import named, record


@pytest.fixture(autouse=True)
def undeclare() -> Iterator[None]:
    """Forget the consumers that a test has declared."""
    before = dict(declare._declared)
    yield
    declare._declared.clear()
    declare._declared.update(before)


@pytest.fixture
def handled(database: Database) -> Handled:
    return Handled(database)


def recorder(name: str, **options: Any) -> declare.Consumer:
    return consumer(name, **{"start": "earliest", **options})(named(record, name))


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
