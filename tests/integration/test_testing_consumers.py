"""`captured_events(deliver=True)` runs consumers in the tests of a project."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import Group
from django.db import IntegrityError, transaction
from django.test import TestCase, TransactionTestCase, override_settings
from django.utils import timezone

from pg_eventstream import asend_event, send_event, send_events
from pg_eventstream.consumers import ConsumedEvent, Consumer, consumer, declare, upcast
from pg_eventstream.errors import EventStreamError
from pg_eventstream.postgres.sequence import sequence_all
from pg_eventstream.testing import captured_events
from tests.support.database import Database


@pytest.fixture(autouse=True)
def no_others() -> None:
    """Begin without the consumers of the test project."""
    declare._declared.clear()


class Recorded(list[ConsumedEvent]):
    """The events that a consumer has handled."""

    @property
    def ids(self) -> list[str]:
        return [event.id for event in self]


def declared(
    name: str, act: Callable[[ConsumedEvent], object] | None = None, **options: Any
) -> tuple[Consumer, Recorded]:
    handled = Recorded()

    def handle(event: ConsumedEvent) -> None:
        handled.append(event)
        if act is not None:
            act(event)

    handle.__qualname__ = name
    return consumer(name, **options)(handle), handled


class Deliver:
    """All of it in one transaction, or with commits."""

    def test_consumers_get_what_was_sent_in_order_at_the_end(self: Any) -> None:
        _, orders = declared("orders", channels=["orders"])
        _, all_ = declared("all")
        _, other = declared("other", prefixes=["room-"])
        send_event("orders", "placed", "before the block")
        with captured_events(deliver=True) as sent:
            send_events([("orders", "placed", {"n": 1}), ("stock", "low", 2)])
            send_event("orders", "paid", {"n": 1}, meta={"by": "ann"})
            assert all_ == []
        assert orders.ids == ["orders:2", "orders:3"]
        assert all_.ids == ["orders:2", "stock:1", "orders:3"]
        assert other == []
        paid = orders[1]
        assert (paid.channel, paid.type, paid.eid) == ("orders", "paid", 3)
        assert (paid.json(), paid.meta) == ({"n": 1}, {"by": "ann"})
        assert (paid.replayed, paid.attempt) == (False, 1)
        assert [e.position for e in all_] == sorted({e.position for e in all_})
        assert paid.committed_at is not None
        assert paid.created <= paid.committed_at <= timezone.now()
        assert len(sent) == 3

    def test_on_demand_each_is_handled_once(self: Any) -> None:
        _, handled = declared("all")
        with captured_events() as sent:
            send_event("a", "message", 1)
            sent.deliver()
            assert handled.ids == ["a:1"]
            sent.deliver()
            send_event("a", "message", 2)
            sent.deliver()
        assert handled.ids == ["a:1", "a:2"]
        send_event("a", "message", 3)
        assert handled.ids == ["a:1", "a:2"]

    def test_what_was_rolled_back_is_not_delivered(self: Any) -> None:
        _, handled = declared("all")
        with captured_events(deliver=True):
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                send_event("a", "message", 1 / 0)
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                send_event("a", "message", "rolled back")
                _ = 1 / 0
            send_event("a", "message", "stays")
        assert [(e.json(), e.eid) for e in handled] == [("stays", 1)]

    def test_what_handlers_send_is_delivered_too(self: Any) -> None:
        def bill(event: ConsumedEvent) -> None:
            send_event("bills", "sent", event.json())

        declared("billing", bill, channels=["orders"])
        _, bills = declared("bills", channels=["bills"])
        with captured_events(deliver=True) as sent:
            send_events([("orders", "paid", 1), ("orders", "paid", 2)])
        assert [e.json() for e in bills] == [1, 2]
        assert [e.channel for e in sent] == ["orders", "orders", "bills", "bills"]

    def test_handlers_that_send_without_end_are_named(self: Any) -> None:
        declared("echo", lambda event: send_event("a", "again", 1), channels=["a"])
        with (
            pytest.raises(EventStreamError, match=r"without end.*'again'.*'a'.*'echo'"),
            captured_events(deliver=True),
        ):
            send_event("a", "message", 1)

    def test_error_of_a_handler_is_raised_and_its_work_rolled_back(self: Any) -> None:
        def fail(event: ConsumedEvent) -> None:
            Group.objects.create(name=event.json())
            if event.json() == "second":
                raise ValueError("no stock")

        _, handled = declared("groups", fail)
        with pytest.raises(ValueError, match="no stock"), captured_events(deliver=True) as sent:
            send_events([("a", "m", "first"), ("a", "m", "second"), ("a", "m", "third")])
        assert [group.name for group in Group.objects.all()] == ["first"]
        assert len(sent) == 3
        assert handled.ids == ["a:1", "a:2"]

    def test_error_that_a_handler_has_hidden_is_raised(self: Any) -> None:
        def hide(event: ConsumedEvent) -> None:
            try:
                Group.objects.create(name="twice")
                Group.objects.create(name="twice")
            except IntegrityError:
                pass

        declared("groups", hide)
        with (
            pytest.raises(EventStreamError, match="caught an error of the database"),
            captured_events(deliver=True),
        ):
            send_event("a", "message", 1)
        assert Group.objects.count() == 0

    def test_error_of_the_block_comes_first(self: Any) -> None:
        _, handled = declared("all")
        with pytest.raises(ZeroDivisionError), captured_events(deliver=True):
            send_event("a", "message", 1)
            _ = 1 / 0
        assert handled == []

    def test_some_consumers_alone(self: Any) -> None:
        one, first = declared("one")
        other, second = declared("other")
        with captured_events(deliver=True, consumers=[one]):
            send_event("a", "message", 1)
            assert one.wait(timeout=60) is True
            assert other.wait(timeout=60) is False
        assert (first.ids, second.ids) == (["a:1"], [])

    def test_wait_of_code_under_test_delivers_at_once(self: Any) -> None:
        stock, handled = declared("stock", channels=["orders"])
        with captured_events(deliver=True):
            with transaction.atomic():
                send_event("orders", "placed", 1)
                assert stock.wait(timeout=60) is True
                assert handled.ids == ["orders:1"]
            assert stock.wait(timeout=60) is True
        assert handled.ids == ["orders:1"]

    def test_wait_in_a_handler(self: Any) -> None:
        stock, _ = declared("a", channels=["orders"])
        _, handled = declared("b", lambda event: stock.wait(timeout=60), channels=["orders"])
        with captured_events(deliver=True):
            send_events([("orders", "placed", n) for n in range(3)])
        assert sorted(handled.ids) == ["orders:1", "orders:2", "orders:3"]

    def test_old_versions_are_converted(self: Any) -> None:
        upcast("placed", from_version=1)(lambda data: {"amount": data})
        _, handled = declared("all")
        with captured_events(deliver=True):
            send_event("orders", "placed", 7)
            send_event("orders", "placed", {"amount": 8}, meta={"version": 2})
        assert [e.json() for e in handled] == [{"amount": 7}, {"amount": 8}]

    @override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Volatile")
    def test_unreliable_channels_are_not_handled(self: Any) -> None:
        _, handled = declared("all")
        with captured_events(deliver=True):
            send_events([("volatile-a", "message", 1), ("a", "message", 2)])
        assert handled.ids == ["a:1"]

    async def test_in_asynchronous_code(self: Any) -> None:
        _, handled = declared("groups", lambda event: Group.objects.create(name=event.json()))
        async with captured_events(deliver=True) as sent:
            await asend_event("a", "message", "first")
            await sync_to_async(sent.deliver)()
            assert await Group.objects.acount() == 1
            await asend_event("a", "message", "second")
        assert handled.ids == ["a:1", "a:2"]
        assert await Group.objects.acount() == 2


class InOneTransaction(Deliver, TestCase):
    __test__ = False  # the test below runs them, with a database


class WithCommits(Deliver, TransactionTestCase):
    __test__ = False


CASES = [
    (kind, name)
    for kind in (InOneTransaction, WithCommits)
    for name in unittest.defaultTestLoader.getTestCaseNames(kind)
]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{k.__name__}-{n}" for k, n in CASES])
def test_consumers_in_tests(kind: type[unittest.TestCase], name: str, database: Database) -> None:
    result = unittest.TestResult()
    unittest.TestSuite([kind(name)]).run(result)
    assert [text for _, text in result.errors + result.failures] == []
    assert result.testsRun == 1


def test_with_pytest(database: Database) -> None:
    _, handled = declared("all")
    with transaction.atomic():
        with captured_events(deliver=True):
            send_event("a", "message", 1)
        transaction.set_rollback(True)
    assert handled.ids == ["a:1"]


def sequence(database: Database) -> None:
    with database.connect() as connection:
        list(sequence_all(connection))


def test_events_that_are_in_order_keep_their_ids(database: Database) -> None:
    """Those of committed events, which a publisher has put in order meanwhile."""
    _, handled = declared("all")
    for _ in range(3):
        database.send("a")
    sequence(database)
    with captured_events(deliver=True):
        send_events([("a", "message", n) for n in range(2)])
        sequence(database)
        send_event("a", "message", 2)
    stored = database.fetch("SELECT eid, position FROM pg_eventstream_stream WHERE eid > 3")
    assert handled.ids == ["a:4", "a:5", "a:6"]
    assert [(e.eid, e.position) for e in handled][:2] == stored
