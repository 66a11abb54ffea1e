"""What the consumers of the test project do. They write to a table ``handled``."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from django.db import connection

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


def record(event: ConsumedEvent, name: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
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


def obey(event: ConsumedEvent, name: str) -> None:
    """Do what the data say, and record the event."""
    value = json.loads(event.data)
    order = value if isinstance(value, dict) else {}
    attempt = order.get("until_attempt", 1_000_000)
    if event.attempt < attempt:
        if "fail" in order:
            raise ValueError(order["fail"])
        if "kill" in order:
            os.kill(os.getpid(), signal.SIGKILL)
        if "sleep" in order:
            time.sleep(order["sleep"])
        if "sql" in order:
            with connection.cursor() as cursor:
                cursor.execute(order["sql"])
    record(event, name)
