"""The transaction in which a person changes a consumer, while none of its events is handled.

It locks all checkpoints of the consumer, which waits for the transactions of handlers, and
increases the epoch in them. No transaction that a process begins with the old epoch can then move a
checkpoint, so each process reads again what is stored. This needs no process to run.

The order of locks, here and wherever several of them are taken: checkpoints (by slot), the
consumer, `PRUNE_LOCK`, slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from django.db import connections, transaction

from ..channels import is_reliable
from ..errors import ConsumerBusy
from ..limits import LIMITS, Limits
from ..postgres.connector import fetch_one
from ..postgres.listener import CONSUMERS
from ..postgres.slots import CHECKPOINTS, SLOTS, follows_sql, slot_sql
from .checkpoints import Connection, lock_out_pruner
from .event import event_id
from .handling import is_transient, raw_connection
from .trouble import unknown_consumer

_T = TypeVar("_T")
_MOST_DEADLOCKS = 5

_LOCK_CHECKPOINTS = f"""
    SELECT c.slot, c.epoch, c.position, c.incarnation
      FROM generate_series(0, {SLOTS - 1}) AS of (slot)
     CROSS JOIN LATERAL (
           SELECT * FROM pg_eventstream_checkpoint
            WHERE consumer_id = %s AND slot = of.slot
            ORDER BY epoch DESC, position DESC LIMIT 1 FOR UPDATE {{skip}}) AS c
     ORDER BY slot
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Checkpoint:
    slot: int
    epoch: int
    position: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Change:
    """A consumer whose rows are all locked, in the transaction that changes it."""

    alias: str
    connection: Connection
    consumer_id: int
    name: str
    #: The new one. `checkpoints` are those from before.
    epoch: int
    paused: bool
    checkpoints: list[Checkpoint]

    def execute(self, query: str, params: Iterable[Any] = ()) -> psycopg.Cursor[Any]:
        """Run a statement whose first parameter is the consumer's id."""
        return self.connection.execute(query, [self.consumer_id, *params])


def change(alias: str, name: str, work: Callable[[Change], _T], limits: Limits = LIMITS) -> _T:
    """Call ``work`` in the transaction that changes the consumer. Returns its result.

    Raises `UnknownConsumer`, and `ConsumerBusy` if a handler does not end its transaction within
    ``limits.command_patience``. Nothing is then changed.
    """
    deadlocks = 0
    while True:
        is_outermost = not connections[alias].in_atomic_block
        try:
            with patient_transaction(alias, limits) as connection:
                return work(_lock(alias, connection, name))
        except psycopg.errors.LockNotAvailable as e:
            raise ConsumerBusy(_explain_lock(alias, name, limits)) from e
        except psycopg.Error as e:
            # Of two that wait for each other, PostgreSQL ends one. The handlers go first.
            deadlocks += 1
            if not is_transient(e) or not is_outermost or deadlocks > _MOST_DEADLOCKS:
                raise


@contextmanager
def patient_transaction(alias: str, limits: Limits) -> Iterator[Connection]:
    """A transaction on Django's connection that waits for locks only for a while."""
    is_outermost = not connections[alias].in_atomic_block
    with transaction.atomic(using=alias):
        connection = raw_connection(alias)
        if is_outermost:
            # Each statement sees what was committed while the one before it waited.
            connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        (before,) = fetch_one(connection, "SELECT current_setting('lock_timeout')")
        milliseconds = str(round(limits.command_patience * 1000))
        connection.execute("SELECT set_config('lock_timeout', %s, true)", [milliseconds])
        yield connection
        connection.execute("SELECT set_config('lock_timeout', %s, true)", [before])


def _lock(alias: str, connection: Connection, name: str) -> Change:
    row = connection.execute(
        "SELECT id FROM pg_eventstream_consumer WHERE name = %s", [name]
    ).fetchone()
    if row is None:
        raise unknown_consumer(connection, name)
    (consumer_id,) = row
    rows = connection.execute(_LOCK_CHECKPOINTS.format(skip=""), [consumer_id]).fetchall()
    checkpoints = [Checkpoint(*row) for row in rows]
    changed = connection.execute(
        "UPDATE pg_eventstream_consumer SET epoch = epoch + 1 WHERE id = %s AND name = %s"
        " RETURNING epoch, paused",
        [consumer_id, name],
    ).fetchone()
    if changed is None:  # renamed or removed in the meantime
        raise unknown_consumer(connection, name)
    epoch, paused = changed
    lock_out_pruner(connection)
    connection.execute(
        "SELECT FROM pg_eventstream_slot WHERE consumer_id = %s ORDER BY slot FOR UPDATE",
        [consumer_id],
    )
    connection.execute(
        """
        UPDATE pg_eventstream_checkpoint AS c SET epoch = %s
          FROM unnest(%s::smallint[], %s::bigint[], %s::bigint[]) AS live (slot, epoch, position)
         WHERE c.consumer_id = %s AND c.slot = live.slot AND c.epoch = live.epoch
           AND c.position = live.position -- their whole key, since many dead rows can be below it
        """,
        [
            epoch,
            [one.slot for one in checkpoints],
            [one.epoch for one in checkpoints],
            [one.position for one in checkpoints],
            consumer_id,
        ],
    )
    notify(connection)
    return Change(alias, connection, consumer_id, name, epoch, paused, checkpoints)


def notify(connection: Connection) -> None:
    """Wake the processes that run consumers, when the transaction commits."""
    connection.execute("SELECT pg_notify(%s, '')", [CONSUMERS])


# Why a lock was not free

_HOLDERS = f"""
    SELECT c.slot, c.position, s.holder,
           extract(epoch FROM clock_timestamp() - session.xact_start)::float8, session.pid
      FROM {CHECKPOINTS.format(consumer_id="%(id)s")} AS c
      JOIN pg_eventstream_slot AS s USING (consumer_id, slot)
      LEFT JOIN LATERAL (
           SELECT xact_start, pid FROM pg_stat_activity
            WHERE backend_xid IS NOT NULL AND backend_xid::text = (
                  SELECT xmax::text FROM pg_eventstream_checkpoint AS k
                   WHERE (k.consumer_id, k.slot, k.epoch, k.position)
                       = (c.consumer_id, c.slot, c.epoch, c.position))
           LIMIT 1) AS session ON true
     WHERE c.slot <> ALL(%(free)s::int[])
     ORDER BY session.xact_start LIMIT 1
"""  # noqa: S608
_NEXT_EVENTS = f"""
    SELECT channel, eid + coalesce(incarnation, 0)
      FROM (SELECT * FROM pg_eventstream_stream WHERE position > %(position)s
             ORDER BY position LIMIT 10000) AS s
      CROSS JOIN (SELECT channels, prefixes FROM pg_eventstream_consumer WHERE id = %(id)s) AS k
     WHERE {follows_sql("s.channel", "k.channels", "k.prefixes")}
       AND {slot_sql("s.channel")} = %(slot)s
     ORDER BY position LIMIT 100
"""  # noqa: S608
_PARKED = (
    "SELECT id, channel, number FROM pg_eventstream_parked WHERE consumer_id = %s AND slot = %s"
)


def _explain_lock(alias: str, name: str, limits: Limits) -> str:
    """Which process holds the lock that was not free, on which event it works, and since when."""
    patience = f"{limits.command_patience:g} seconds"
    nothing = f"The consumer {name!r} was not changed: "
    with transaction.atomic(using=alias):
        connection = raw_connection(alias)
        row = connection.execute(
            "SELECT id FROM pg_eventstream_consumer WHERE name = %s", [name]
        ).fetchone()
        found = None
        if row is not None:
            free = connection.execute(
                _LOCK_CHECKPOINTS.format(skip="SKIP LOCKED"), [row[0]]
            ).fetchall()
            found = connection.execute(
                _HOLDERS, {"id": row[0], "free": [slot for slot, *_ in free]}
            ).fetchone()
        if row is None or found is None:
            return (
                f"{nothing}another session held a lock for {patience}, and does not hold it any"
                " more. Try again."
            )
        slot, position, holder, seconds, pid = found
        event = _event_of(connection, row[0], slot, position)
        session = "" if pid is None else f" (session {pid})"
        since = "" if seconds is None else f" for {seconds:.0f} seconds"
        return (
            f"{nothing}the process {holder or 'that handles its events'}{session} has worked"
            f" on {event}{since}, and its transaction has not ended within {patience}. Wait until"
            " it ends, or end the process, and try again. With timeout= in the code of the"
            " consumer, a handler that hangs is ended without a person."
        )


def _event_of(connection: Connection, consumer_id: int, slot: int, position: int) -> str:
    """The event whose handler holds the lock of a slot: the first that is not handled, or a parked
    one that is tried again.
    """
    parked = connection.execute(_PARKED, [consumer_id, slot]).fetchall()
    if parked:
        free = connection.execute(f"{_PARKED} FOR UPDATE SKIP LOCKED", [consumer_id, slot])
        unlocked = {pk for pk, *_ in free.fetchall()}
        for pk, channel, number in parked:
            if pk not in unlocked:
                return f"the parked event {event_id(channel, number)}"
    rows = connection.execute(
        _NEXT_EVENTS, {"position": position, "id": consumer_id, "slot": slot}
    ).fetchall()
    for channel, number in rows:
        if is_reliable(channel):
            return f"the event {event_id(channel, number)}"
    return f"an event of its slot {slot}"
