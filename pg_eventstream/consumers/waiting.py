"""Waits until a consumer has handled what was committed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from django.db import connections
from django.db.transaction import TransactionManagementError

from ..backoff import Backoff
from ..conf import conf
from ..postgres.connector import fetch_one
from ..postgres.sequence import reached
from ..postgres.slots import HANDLED, SLOTS, follows_sql, slot_sql
from .checkpoints import Connection
from .declaration import Declaration
from .handling import raw_connection

_FIRST, _LONGEST = 0.005, 0.1

#: The slots that have not handled an event up to a position: it is in the stream, or it was pruned
#: before; or nobody can tell, because the checkpoint belongs to another stream, or is missing.
_UNHANDLED = f"""
    SELECT of.slot
      FROM generate_series(0, {SLOTS - 1}) AS of (slot)
      LEFT JOIN {HANDLED} AS h ON h.name = %(name)s AND h.slot = of.slot
     WHERE h.position IS NULL OR h.position < h.checkpoint
        OR EXISTS (SELECT FROM pg_eventstream_slot AS s
                    WHERE s.consumer_id = h.consumer_id AND s.slot = h.slot
                      AND s.lost > h.position)
        OR h.position < %(position)s AND EXISTS (
           SELECT FROM (SELECT channel FROM pg_eventstream_stream
                         WHERE position > h.position AND position <= %(position)s
                         ORDER BY position OFFSET 0) AS s
            WHERE {follows_sql("s.channel", "%(channels)s::text[]", "%(prefixes)s::text[]")}
              AND {slot_sql("s.channel")} = h.slot)
"""  # noqa: S608


Deliver = Callable[[Declaration], bool]
# Blocks of tests that deliver events themselves: the database, and what handles its events.
_blocks: list[tuple[str, Deliver]] = []


@contextmanager
def delivering(alias: str, deliver: Deliver) -> Iterator[None]:
    """In this block, call ``deliver`` instead of waiting for processes that cannot see the events.

    It returns whether the consumer has handled them.
    """
    block = alias, deliver
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)


def wait(consumer: Declaration, timeout: float) -> bool:
    """See `Consumer.wait`."""
    alias = conf.database
    for of, deliver in reversed(_blocks):
        if of == alias:
            return deliver(consumer)
    refuse_in_transaction(alias, "wait()")
    connection = raw_connection(alias)
    (snapshot,) = fetch_one(connection, "SELECT pg_current_snapshot()::text")
    deadline = time.monotonic() + timeout
    backoff = Backoff(_FIRST, _LONGEST)
    position: int | None = None
    while True:
        if position is None:
            position = reached(connection, snapshot)
        if position is not None and not unhandled(connection, consumer, position):
            return True
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(backoff.next(), left))


def unhandled(connection: Connection, consumer: Declaration, position: int) -> set[int]:
    """The slots that have not handled all their events up to a position.

    All, if the consumer is not registered.
    """
    rows = connection.execute(
        _UNHANDLED,
        {
            "name": consumer.name,
            "position": position,
            "channels": list(consumer.channels),
            "prefixes": list(consumer.prefixes),
        },
    ).fetchall()
    return {slot for (slot,) in rows}


def refuse_in_transaction(alias: str, what: str) -> None:
    """Raise `TransactionManagementError` in an atomic block, whose events are not committed."""
    if connections[alias].in_atomic_block:
        raise TransactionManagementError(
            f"{what} concerns committed events, and this is in transaction.atomic(), so its own"
            " events are not committed. Call it after the block. In a TestCase, use"
            " captured_events(deliver=True)."
        )
