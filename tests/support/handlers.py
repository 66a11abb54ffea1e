"""What the consumers of the test project do. They write to a table ``handled``."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from django.db import DatabaseError, connection, transaction

from pg_eventstream import send_event
from pg_eventstream.consumers import ConsumedEvent

Handler = Callable[[ConsumedEvent, str], Any]

#: The handled events. Nothing is unique, so that an event that is handled twice shows.
TABLE = """
    CREATE TABLE IF NOT EXISTS handled (
        nth bigint GENERATED ALWAYS AS IDENTITY, consumer text, channel text, eid bigint, data text,
        attempt int, replayed boolean, pid int)
"""


def named(handler: Handler, name: str) -> Callable[[ConsumedEvent], Any]:
    """The handler of one consumer."""

    @functools.wraps(handler)
    def handle(event: ConsumedEvent) -> Any:
        return handler(event, name)

    handle.__qualname__ = f"{handler.__qualname__}.{name}"
    return handle


def sql(statement: str, params: list[Any] | None = None) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement, params)


def record(event: ConsumedEvent, name: str) -> None:
    sql(
        "INSERT INTO handled (consumer, channel, eid, data, attempt, replayed, pid)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s)",
        [
            name,
            event.channel,
            event.eid,
            event.data,
            event.attempt,
            event.replayed,
            os.getpid(),
        ],
    )


def record_slowly(event: ConsumedEvent, name: str) -> None:
    record(event, name)
    time.sleep(0.005)


def relay(event: ConsumedEvent, name: str) -> None:
    """Send another event because of this one."""
    record(event, name)
    send_event(f"because-of-{event.channel}", "message", event.id)


def _swallow(value: Any) -> None:
    with suppress(DatabaseError):
        sql("SELECT 1 / 0")


def _raise(value: Any) -> None:
    raise ValueError(value)


def _recurse(value: Any) -> None:
    _recurse(value)


#: What an event can make `obey` do.
ORDERS: dict[str, Callable[[Any], object]] = {
    "fail": _raise,
    "kill": lambda value: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda value: sql("SELECT pg_terminate_backend(pg_backend_pid())"),
    "sleep": time.sleep,
    "sql": sql,
    "exit": sys.exit,
    "swallow": _swallow,
    "rollback": lambda value: transaction.set_rollback(True),
    "close": lambda value: connection.close(),
    "recurse": _recurse,
}


def obey(event: ConsumedEvent, name: str) -> None:
    """Do what the data say, before or after recording the event."""
    value = json.loads(event.data)
    order = value if isinstance(value, dict) else {}
    if order.pop("recorded", False):
        record(event, name)
    if event.attempt < order.pop("until_attempt", 1_000_000):
        for what, argument in order.items():
            ORDERS[what](argument)
    if not (isinstance(value, dict) and "recorded" in json.loads(event.data)):
        record(event, name)
