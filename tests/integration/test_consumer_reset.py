"""A consumer is reset to any place that is stored, in one transaction with what prepares it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from datetime import timezone as zones
from typing import Any

import pytest
from django.db import connection, transaction
from django.test import override_settings
from django.utils import timezone

from pg_eventstream import send_event, send_events
from pg_eventstream.consumers import Consumer, Retry, consumer, declare, operations
from pg_eventstream.consumers.handling import raw_connection
from pg_eventstream.consumers.targets import parse_target
from pg_eventstream.consumers.trouble import find_consumer, list_parked
from pg_eventstream.errors import OperationRefused
from tests.support.consumers import Handled, handle_all
from tests.support.database import Database
from tests.support.handlers import named, obey
from tests.support.rounds import prune, sequence


def make(name: str = "stock", **options: Any) -> Consumer:
    return consumer(name, **{"start": "earliest", "retry": Retry(1), **options})(named(obey, name))


def reset(target: str, name: str = "stock") -> operations.Reset:
    return operations.reset("default", name, parse_target(target))


def again(database: Database) -> list[tuple[int, bool]]:
    """The events that are handled now, and whether they are said to be replayed."""
    database.execute("DELETE FROM handled")
    handle_all(declare._declared["stock"])
    return database.fetch("SELECT eid, replayed FROM handled ORDER BY nth")


UTC = zones.utc


def hours_ago(hours: float, zone: Any = None) -> datetime:
    return timezone.localtime(timezone=zone) - timedelta(hours=hours)


#: The event after which it continues, of the events 1 to 5, which are 5 to 1 hours old.
TARGETS: dict[str, tuple[Callable[[], str], int]] = {
    "earliest": (lambda: "earliest", 0),
    "latest": (lambda: "latest", 5),
    "id": (lambda: "orders:2", 2),
    "position": (lambda: "3", 3),
    "zero": (lambda: "0", 0),
    "last": (lambda: "5", 5),
    "age": (lambda: "150m", 3),
    "age of all": (lambda: "7d", 0),
    "age of none": (lambda: "30s", 5),
    "time": (lambda: hours_ago(3.5).isoformat(), 2),
    "time in another zone": (
        lambda: hours_ago(3.5, timezone.get_fixed_timezone(300)).isoformat(), 2),
    "time in UTC": (lambda: f"{hours_ago(3.5, UTC):%Y-%m-%dT%H:%M:%SZ}", 2),
    "naive time": (lambda: hours_ago(3.5).replace(tzinfo=None).isoformat(), 2),
    "tomorrow": (lambda: f"{hours_ago(-24):%Y-%m-%d}", 5),
    "long ago": (lambda: "2020-01-01", 0),
}  # fmt: skip


def test_continues_at_the_place(database: Database, handled: Handled) -> None:
    make()
    for n in range(1, 6):
        send_event("orders", "placed", n)
        sequence(database)
        database.execute(
            "UPDATE pg_eventstream_stream SET sequenced_at = now() - %s * interval '1 hour'"
            " WHERE position = %s",
            [6 - n, n],
        )
    handle_all(declare._declared["stock"])
    for name, (target, after) in TARGETS.items():
        with override_settings(TIME_ZONE="Asia/Kolkata"):
            result = reset(target())
        assert result.position == after, name
        assert result.replay_to == (None if after == 5 else 5), name
    reset("orders:2")
    send_event("orders", "placed", 6)
    assert again(database) == [(3, True), (4, True), (5, True), (6, False)]


@pytest.mark.parametrize(
    "text",
    ["", "yesterday", "orders", "orders:", "orders:x", ":1", "10y", "1.5", "2026-13-01", "error",
     "2026-01-32T00:00:00", "orders:1,mails:2", "99999999999999999999", "10m\n20m"],
)  # fmt: skip
def test_nonsense_is_no_place(text: str) -> None:
    with pytest.raises(OperationRefused, match=r"is no (place|time)"):
        parse_target(text)


PRUNED = {
    "0": "Not all events after position 0 are stored: those up to position 3 are pruned",
    "2": "Not all events after position 2 are stored",
    "1d": "The oldest one left|Not all events since",
    "2020-01-01": "Not all events since 2020-01-01 00:00:00",
    "orders:2": "The event orders:2 is not stored: it was pruned, or was never sent",
    "orders:9": "The event orders:9 is not stored: it was pruned, or was never sent",
    "other:1": "The event other:1 is not stored",
    "orders:1000000000004": "The event orders:1000000000004 is not stored",
    "6": "Position 6 is not reached yet: the last one is 5",
}


def test_what_is_not_stored_is_refused(database: Database, handled: Handled) -> None:
    make()
    for n in range(3):
        send_event("orders", "placed", n)
    handle_all(declare._declared["stock"])
    prune()
    send_events([("orders", "placed", n) for n in (4, 5)])
    handle_all(declare._declared["stock"])
    before = database.fetch("SELECT * FROM pg_eventstream_checkpoint ORDER BY slot")
    for target, message in PRUNED.items():
        with pytest.raises(OperationRefused, match=message):
            reset(target)
    assert database.fetch("SELECT * FROM pg_eventstream_checkpoint ORDER BY slot") == before
    assert reset("3").position == 3
    assert reset("earliest").position == 3
    assert again(database) == [(4, True), (5, True)]


def test_before_reset_is_part_of_the_reset(database: Database, handled: Handled) -> None:
    stock = make()
    send_events([("orders", "placed", n) for n in range(3)])
    handle_all(stock)
    calls = []

    @stock.before_reset
    def empty() -> None:
        with connection.cursor() as cursor:
            cursor.execute("DELETE FROM handled")
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("not today")

    with pytest.raises(operations.ResetNotPrepared, match=r"not reset, because.*ValueError: not"):
        reset("earliest")
    assert handle_all(stock) == 0
    assert handled.count("stock") == 3
    assert reset("earliest").prepared
    assert handled.count("stock") == 0
    assert handle_all(stock) == 3


def test_replayed_remembers_the_highest_place(database: Database, handled: Handled) -> None:
    stock = make()
    send_events([("orders", "placed", n) for n in range(1, 4)])
    handle_all(stock)
    assert reset("earliest").replay_to == 3
    assert reset("1").replay_to == 3  # before anything was handled again
    assert again(database) == [(2, True), (3, True)]
    assert reset("latest").replay_to is None
    send_events([("orders", "placed", n) for n in (4, 5)])
    assert again(database) == [(4, False), (5, False)]


def test_reset_forgets_failures_and_unparks_what_is_handled_again(
    database: Database, handled: Handled
) -> None:
    stock = make()
    poison = {"fail": "x"}
    send_events(
        [("orders", "placed", poison), ("orders", "placed", 2), ("orders", "placed", poison)]
    )
    handle_all(stock)
    assert parked() == ["orders:1", "orders:3"]
    assert reset("orders:2").unparked == 1
    assert parked() == ["orders:1"]
    handle_all(stock)
    assert parked() == ["orders:1", "orders:3"]
    database.execute(
        "UPDATE pg_eventstream_slot SET failing = 9, attempts = 3, error = 'x', stopped = true,"
        " retry_at = now() + interval '1 day', lost = 1"
    )
    reset("earliest")
    assert database.fetch(
        "SELECT DISTINCT failing, attempts, error, stopped, retry_at, lost FROM pg_eventstream_slot"
    ) == [(None, 0, "", False, None, None)]
    assert again(database) == [(2, True)]


def test_parked_events_that_are_pruned_stay_parked(database: Database, handled: Handled) -> None:
    """They would not be handled again."""
    stock = make()
    send_events([("orders", "placed", {"fail": "x"}), ("orders", "placed", 2)])
    handle_all(stock)
    database.execute("DELETE FROM pg_eventstream_stream WHERE position = 1")
    database.execute("UPDATE pg_eventstream_stream SET position = 0 WHERE position = 2")
    reset("earliest")
    assert parked() == ["orders:1"]


def parked() -> list[str]:
    with transaction.atomic():
        here = raw_connection("default")
        return [event.id for event in list_parked(here, find_consumer(here, "stock"))]


def test_restored_stream_is_not_taken_for_replayed(database: Database, handled: Handled) -> None:
    """A checkpoint above the end of the stream is of events that this stream never had."""
    stock = make()
    send_events([("orders", "placed", n) for n in range(1, 4)])
    handle_all(stock)
    database.execute("UPDATE pg_eventstream_checkpoint SET position = 50")
    database.execute("UPDATE pg_eventstream_slot SET replay_to = 60")
    assert reset("1").replay_to == 3
    send_event("orders", "placed", 4)
    assert again(database) == [(2, True), (3, True), (4, False)]


def test_reset_works_in_a_transaction_of_the_caller(database: Database, handled: Handled) -> None:
    """As in a view with ATOMIC_REQUESTS: it takes effect, or is undone, with the transaction."""
    stock = make()
    send_event("orders", "placed", 1)
    handle_all(stock)
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        reset("earliest")
        _ = 1 / 0
    assert handle_all(stock) == 0
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL lock_timeout = '7s'")
        reset("earliest")
        cursor.execute("SHOW lock_timeout")
        assert cursor.fetchone() == ("7s",)
    assert handle_all(stock) == 1


@pytest.mark.parametrize("level", ["serializable"])
def test_reset_with_another_isolation_level(
    database: Database, handled: Handled, level: str
) -> None:
    stock = make()
    send_event("orders", "placed", 1)
    handle_all(stock)
    database.execute(
        f"ALTER DATABASE {database.name} SET default_transaction_isolation = '{level}'"
    )
    connection.close()
    reset("earliest")
    assert handle_all(stock) == 1


def test_events_that_were_never_handled_are_no_replay(database: Database, handled: Handled) -> None:
    """Those that the consumer was behind when it was reset, once and twice."""
    stock = make()
    send_events([("orders", "placed", n) for n in range(3)])
    handle_all(stock)
    send_events([("orders", "placed", n) for n in range(3)])
    sequence(database)
    for _ in range(2):
        reset("earliest")
    assert again(database) == [(eid, eid <= 3) for eid in range(1, 7)]
