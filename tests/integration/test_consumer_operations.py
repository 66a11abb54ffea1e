"""What a person does to consumers takes effect at once, whether or not a process runs them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection, transaction

from pg_eventstream import send_event, send_events
from pg_eventstream.consumers import ConsumedEvent, Consumer, Retry, consumer, declare, operations
from pg_eventstream.consumers.handling import raw_connection
from pg_eventstream.consumers.progress import ConsumerState, read_consumers
from pg_eventstream.consumers.trouble import find_consumer, list_parked
from pg_eventstream.errors import ConsumerBusy, ConsumerStopped, UnknownConsumer
from pg_eventstream.limits import Limits
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.servers.processes import wait_until
from tests.support.consumers import Handled, handle_all, running_worker
from tests.support.database import Database
from tests.support.handlers import named, obey
from tests.support.rounds import sequence

IMPATIENT = Limits(command_patience=0.3)


def make(name: str = "stock", handler: Any = obey, **options: Any) -> Consumer:
    declare._declared.pop(name, None)
    return consumer(name, **{"start": "earliest", "retry": Retry(1), **options})(
        named(handler, name)
    )


def state(name: str = "stock") -> ConsumerState:
    with Connector("default").connect("test") as connection:
        found = read_consumers(connection, declare.discover())
    return next(one for one in found or [] if one.name == name)


def is_held() -> bool:
    return not state().unheld_slots


def parked_ids(name: str = "stock") -> list[str]:
    with transaction.atomic():
        here = raw_connection("default")
        return [event.id for event in list_parked(here, find_consumer(here, name))]


def epochs(database: Database) -> set[int]:
    """The epochs of a consumer and of its live checkpoints, which must be equal."""
    return {row[0] for row in database.fetch(
        "SELECT epoch FROM pg_eventstream_consumer UNION ALL SELECT epoch FROM"
        " pg_eventstream_checkpoint")}  # fmt: skip


# Each operation, in each situation

POISON = {"fail": "no such product", "until_attempt": 2}

Operation = Callable[[str, Limits], object]
OPERATIONS: dict[str, Operation] = {
    "pause": lambda name, limits: operations.pause("default", name, limits),
    "resume": lambda name, limits: operations.resume("default", name, limits),
    "reset": lambda name, limits: operations.reset("default", name, "earliest", limits),
    "skip": lambda name, limits: operations.skip("default", name, "orders:2", limits),
    "rename": lambda name, limits: operations.rename("default", name, "goods", limits),
    "remove": lambda name, limits: operations.remove("default", name, limits),
    "retry": lambda name, limits: operations.retry("default", name, ["orders:2"], limits),
}
#: What is handled in the end, if the code that runs then has the consumer's name of then: events 1
#: and 3 once, 2 parked, and 4 sent after the operation.
IN_THE_END = {
    "pause": [1, 3],
    "resume": [1, 3, 4],
    "reset": [1, 3, 1, 3, 4],
    "skip": [1, 3, 4],
    "rename": [1, 3, 4],
    "remove": [1, 3, 1, 3, 4],
    "retry": [1, 3, 2, 4],
}
PARKED: dict[str, list[str]] = {"skip": [], "retry": []}


def but_a_part_is_thorough(*kept: str) -> list[Any]:
    """All operations, of which `make test` runs those that are kept."""
    slow = [pytest.mark.faults, pytest.mark.thorough]
    return [pytest.param(name, marks=[] if name in kept else slow) for name in OPERATIONS]


def with_a_parked_event() -> Consumer:
    """A consumer that has handled the events 1 and 3, and parked 2."""
    stock = make()
    send_events([("orders", "placed", 1), ("orders", "placed", POISON), ("orders", "placed", 3)])
    handle_all(stock)
    assert parked_ids() == ["orders:2"]
    return stock


def finish(name: str) -> None:
    """Handle the rest with the code that belongs to the present name."""
    try:
        handle_all(make("goods", named_as_before) if name == "rename" else make())
    except ConsumerStopped as e:
        assert name == "pause", e  # noqa: PT017


def named_as_before(event: ConsumedEvent, name: str) -> None:
    obey(event, "stock")


def check_the_end(database: Database, handled: Handled, name: str) -> None:
    assert sorted(handled.eids("stock")["orders"]) == sorted(IN_THE_END[name])
    assert len(epochs(database)) == 1
    assert parked_ids("goods" if name == "rename" else "stock") == PARKED.get(name, ["orders:2"])


@pytest.mark.parametrize("name", but_a_part_is_thorough("reset", "remove"))
def test_operation_without_a_process(database: Database, handled: Handled, name: str) -> None:
    with_a_parked_event()
    OPERATIONS[name]("stock", Limits())
    send_event("orders", "placed", 4)
    finish(name)
    check_the_end(database, handled, name)


@pytest.mark.parametrize("name", but_a_part_is_thorough("retry"))
def test_operation_while_a_process_runs(database: Database, handled: Handled, name: str) -> None:
    stock = with_a_parked_event()
    with running_worker(stock):
        wait_until(is_held, timeout=10)
        OPERATIONS[name]("stock", Limits())
        send_event("orders", "placed", 4)
        if name not in ("pause", "rename", "remove"):
            handled.wait("stock", len(IN_THE_END[name]))
    if name == "retry":
        assert handled.eids("stock")["orders"] == IN_THE_END[name]
    finish(name)
    check_the_end(database, handled, name)


class Gate:
    """A handler that waits at the event 4, in the middle of its transaction."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def handle(self, event: ConsumedEvent, name: str) -> None:
        obey(event, "stock")
        if event.eid == 4:
            self.entered.set()
            assert self.open.wait(20)


#: Where the handler of the event 4 was in flight during the operation.
IN_FLIGHT = IN_THE_END | {"pause": [1, 3, 4], "reset": [1, 3, 4] * 2, "remove": [1, 3, 4] * 2}


@pytest.mark.parametrize("name", but_a_part_is_thorough("reset", "remove", "skip"))
def test_operation_waits_for_the_handler_in_flight(
    database: Database, handled: Handled, name: str
) -> None:
    with_a_parked_event()
    gate = Gate()
    done = threading.Event()

    def operate() -> None:
        OPERATIONS[name]("stock", Limits())
        done.set()
        connection.close()

    send_event("orders", "placed", 4)
    with running_worker(make(handler=gate.handle)):
        assert gate.entered.wait(10)
        thread = threading.Thread(target=operate)
        thread.start()
        if name == "retry":  # the only one that need not wait
            assert done.wait(10)
        else:
            blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            wait_until(lambda: database.value(blocked) == 1, timeout=10)
            assert not done.is_set()
        gate.open.set()
        thread.join(10)
        assert done.is_set()
        handled.wait("stock", 3)
    finish(name)
    assert sorted(handled.eids("stock")["orders"]) == sorted(IN_FLIGHT[name])
    assert len(epochs(database)) == 1


@pytest.mark.parametrize("name", but_a_part_is_thorough("pause"))
def test_operation_names_the_handler_that_hangs(
    database: Database, handled: Handled, name: str
) -> None:
    with_a_parked_event()
    gate = Gate()
    send_event("orders", "placed", 4)
    before = database.fetch("SELECT * FROM pg_eventstream_consumer")
    with running_worker(make(handler=gate.handle)) as worker:
        assert gate.entered.wait(10)
        if name == "retry":
            OPERATIONS[name]("stock", IMPATIENT)
        else:
            with pytest.raises(ConsumerBusy) as caught:
                OPERATIONS[name]("stock", IMPATIENT)
            message = str(caught.value)
            assert worker.holder in message
            assert "the event orders:4 for " in message
            assert " seconds" in message
        assert database.fetch("SELECT * FROM pg_eventstream_consumer") == before
        gate.open.set()
        handled.wait("stock", 3)
    assert len(epochs(database)) == 1


@pytest.mark.parametrize("name", but_a_part_is_thorough("retry"))
def test_operation_on_a_paused_consumer(database: Database, handled: Handled, name: str) -> None:
    stock = with_a_parked_event()
    operations.pause("default", "stock")
    assert not operations.pause("default", "stock")
    with running_worker(stock):
        wait_until(is_held, timeout=10)
        OPERATIONS[name]("stock", Limits())
        send_event("orders", "placed", 4)
        sequence(database)
        if name == "resume":
            handled.wait("stock", 3)
        elif name != "remove":
            new = "goods" if name == "rename" else "stock"
            assert state(new).paused
            assert handled.eids("stock")["orders"] == [1, 3]
    if name in ("resume", "remove"):
        finish(name)
        check_the_end(database, handled, name)
        return
    assert handled.eids("stock")["orders"] == [1, 3]
    operations.resume("default", "goods" if name == "rename" else "stock")
    finish(name)
    expected = IN_THE_END[name] + [4] * (name == "pause")
    assert sorted(handled.eids("stock")["orders"]) == sorted(expected)


def test_unknown_names_are_told_with_those_that_there_are(
    database: Database, handled: Handled
) -> None:
    def check(name: str, message: str) -> None:
        for operation in OPERATIONS.values():
            with pytest.raises(UnknownConsumer, match=message):
                operation(name, Limits())

    check("stock", "There are: none")
    with_a_parked_event()
    make("declared")
    check("stocks", r"Did you mean 'stock'\? There are: 'stock'\.")
    check("declared", "'declared' has never run")
    operations.rename("default", "stock", "goods")
    check("stock", "'stock' was renamed to 'goods'")


@pytest.mark.parametrize("name", but_a_part_is_thorough("resume"))
def test_operation_on_an_orphaned_consumer(database: Database, handled: Handled, name: str) -> None:
    with_a_parked_event()
    del declare._declared["stock"]
    assert state().declared is False
    OPERATIONS[name]("stock", Limits())
    send_event("orders", "placed", 4)
    finish(name)
    check_the_end(database, handled, name)


def test_consumer_whose_rows_are_incomplete_can_be_removed(
    database: Database, handled: Handled
) -> None:
    """As its error says, after tables were restored in part."""
    stock = with_a_parked_event()
    database.execute("DELETE FROM pg_eventstream_checkpoint WHERE slot < 9")
    database.execute("DELETE FROM pg_eventstream_slot WHERE slot > 5")
    with pytest.raises(ConsumerStopped, match="remove stock"):
        handle_all(stock)
    operations.remove("default", "stock")
    for table in ("consumer", "checkpoint", "slot", "parked"):
        assert database.value(f"SELECT count(*) FROM pg_eventstream_{table}") == 0
    handle_all(stock)
    assert handled.eids("stock") == {"orders": [1, 3, 1, 3]}
