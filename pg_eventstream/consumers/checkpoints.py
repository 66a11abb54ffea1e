"""What consumers store: how far each slot is, what fails, and parked events.

All functions take a psycopg connection. Those that handle events run on Django's, in the
transaction of the handler; others need one in autocommit mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg
from psycopg.pq import ExecStatus

from ..errors import ConsumerStopped, UnknownConsumer
from ..postgres.connector import fetch_one
from ..postgres.locks import LOCK_SPACE, PRUNE_LOCK
from ..postgres.sequence import CURSOR
from ..postgres.slots import CHECKPOINTS, SLOTS
from .declaration import Declaration

Connection = psycopg.Connection[Any]

# A setting that lasts as long as a transaction.
_MARK = "pg_eventstream.handling"

#: The characters of an error and of a traceback that are stored.
ERROR_LENGTH, TRACEBACK_LENGTH = 2000, 20_000

#: The position after which a consumer begins. Imported events have positions below 1.
EARLIEST = f"""
    SELECT coalesce((SELECT position - 1 FROM pg_eventstream_stream ORDER BY position LIMIT 1),
                    (SELECT position FROM {CURSOR} AS c), 0)
"""  # noqa: S608
LATEST = f"SELECT coalesce((SELECT position FROM {CURSOR} AS c), 0)"  # noqa: S608


_REGISTERED = f"""
    SELECT id, (SELECT count(*) FROM {CHECKPOINTS.format(consumer_id="k.id")} AS c),
           (SELECT count(*) FROM pg_eventstream_slot WHERE consumer_id = k.id)
      FROM pg_eventstream_consumer AS k WHERE name = %s
"""  # noqa: S608


class Move(NamedTuple):
    """A checkpoint's old key and its new position."""

    slot: int
    epoch: int
    old: int
    new: int


@dataclass(slots=True)
class SlotState:
    """What is stored about a slot when a process takes it."""

    slot: int
    epoch: int
    position: int
    incarnation: int
    #: The process that had the slot and has not released it. None if it stopped in order.
    last_holder: str | None
    failing: int | None
    attempts: int
    error: str
    retry_seconds: float | None
    stopped: bool
    replay_to: int | None


def register(connection: Connection, consumer: Declaration, *, create: bool = True) -> int:
    """Create the consumer's rows, unless they exist. Returns its id.

    Raises `UnknownConsumer` if the consumer has another name now, or if it does not exist and is
    not to be created; and `ConsumerStopped` if some of its rows are missing.
    """
    with connection.transaction():
        found = connection.execute(
            """
            UPDATE pg_eventstream_consumer SET channels = %(channels)s, prefixes = %(prefixes)s
             WHERE name = %(name)s AND (channels, prefixes) <> (%(channels)s, %(prefixes)s)
            """,
            _filters(consumer),
        )
        row = connection.execute(_REGISTERED, [consumer.name]).fetchone()
        if row is None:
            return _create(connection, consumer, create)
        if row[1:] != (SLOTS, SLOTS):
            raise ConsumerStopped(
                f"The consumer {consumer.name!r} is registered, but only {min(row[1:])} of its"
                f" {SLOTS} slots are there: its tables were emptied or restored in part. Restore"
                " pg_eventstream_consumer, pg_eventstream_checkpoint and pg_eventstream_slot"
                " together. Or let it begin anew when it runs: manage.py eventstream_consumers"
                f" remove {consumer.name}"
            )
        if found.rowcount:
            # What is pruned without being handled is decided by these.
            lock_out_pruner(connection)
        return int(row[0])


def _create(connection: Connection, consumer: Declaration, create: bool) -> int:
    renamed = connection.execute(
        "SELECT name FROM pg_eventstream_consumer WHERE %s = ANY(former_names)", [consumer.name]
    ).fetchone()
    if renamed is not None:
        raise UnknownConsumer(
            f"The consumer {consumer.name!r} was renamed to {renamed[0]!r}. Rename it in the code,"
            f" too ({consumer.place}); or, for a new consumer, choose a name that was not used"
            " before."
        )
    if not create:
        raise UnknownConsumer(
            f"The consumer {consumer.name!r} was removed while processes ran it. To begin anew with"
            " it, start them again; otherwise delete its code."
        )
    # From here on, the pruner sees the checkpoints.
    lock_out_pruner(connection)
    (start,) = fetch_one(connection, EARLIEST if consumer.start == "earliest" else LATEST)
    row = connection.execute(
        """
        INSERT INTO pg_eventstream_consumer (name, channels, prefixes)
        VALUES (%(name)s, %(channels)s, %(prefixes)s) ON CONFLICT (name) DO NOTHING RETURNING id
        """,
        _filters(consumer),
    ).fetchone()
    if row is None:  # another process was faster
        (consumer_id,) = fetch_one(
            connection, "SELECT id FROM pg_eventstream_consumer WHERE name = %s", [consumer.name]
        )
        return int(consumer_id)
    for table in ("checkpoint", "slot", "parked"):
        # Of a consumer whose row is lost, and whose id was given again.
        connection.execute(
            f"DELETE FROM pg_eventstream_{table} WHERE consumer_id = %s",  # noqa: S608
            [row[0]],
        )
    connection.execute(
        f"""
        INSERT INTO pg_eventstream_checkpoint (consumer_id, slot, epoch, position, incarnation)
        SELECT %s, slot, 0, %s, coalesce((SELECT incarnation FROM {CURSOR} AS c), 0)
          FROM generate_series(0, {SLOTS - 1}) AS slot
        """,  # noqa: S608
        [row[0], start],
    )
    connection.execute(
        "INSERT INTO pg_eventstream_slot (consumer_id, slot)"
        " SELECT %s, slot FROM generate_series(0, %s) AS slot",
        [row[0], SLOTS - 1],
    )
    return int(row[0])


def lock_out_pruner(connection: Connection) -> None:
    connection.execute(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {PRUNE_LOCK})")


def _filters(consumer: Declaration) -> dict[str, Any]:
    return {
        "name": consumer.name,
        "channels": list(consumer.channels),
        "prefixes": list(consumer.prefixes),
    }


def take(
    connection: Connection, consumer_id: int, slots: Iterable[int], holder: str
) -> list[SlotState]:
    """Write down who handles the events of these slots. Returns what is stored about them."""
    rows = connection.execute(
        f"""
        WITH old AS MATERIALIZED (
            SELECT * FROM pg_eventstream_slot
             WHERE consumer_id = %(id)s AND slot = ANY(%(slots)s) ORDER BY slot FOR UPDATE
        ), taken AS (
            UPDATE pg_eventstream_slot AS s
               SET holder = %(holder)s, heartbeat = statement_timestamp()
              FROM old WHERE (s.consumer_id, s.slot) = (old.consumer_id, old.slot)
        )
        SELECT slot, c.epoch, c.position, c.incarnation, nullif(nullif(old.holder, %(holder)s), ''),
               old.failing, old.attempts, old.error,
               greatest(extract(epoch FROM old.retry_at - statement_timestamp()), 0)::float8,
               old.stopped, old.replay_to
          FROM old JOIN {CHECKPOINTS.format(consumer_id="%(id)s")} AS c USING (slot)
         ORDER BY slot
        """,  # noqa: S608
        {"id": consumer_id, "slots": list(slots), "holder": holder},
    ).fetchall()
    return [SlotState(*row) for row in rows]


def own_pid(connection: Connection) -> int | None:
    """The process id of the server's session; None if a pooler chooses one per transaction."""
    (pid,) = fetch_one(connection, "SELECT pg_backend_pid()")
    return int(pid) if pid == connection.info.backend_pid else None


def release(connection: Connection, consumer_id: int, slots: Iterable[int], holder: str) -> None:
    """Write down that this holder has stopped in order, so that no attempt is counted."""
    connection.execute(
        "UPDATE pg_eventstream_slot SET holder = ''"
        " WHERE consumer_id = %s AND slot = ANY(%s) AND holder = %s",
        [consumer_id, list(slots), holder],
    )


def hold(connection: Connection, consumer_id: int, slot: int, holder: str) -> None:
    """Write down again, after `release`, who handles the events of a slot."""
    connection.execute(
        "UPDATE pg_eventstream_slot SET holder = %s"
        " WHERE consumer_id = %s AND slot = %s AND holder = ''",
        [holder, consumer_id, slot],
    )


def beat(connection: Connection, held: Iterable[tuple[int, int]], holder: str) -> None:
    """Write down that the holder of these slots, each with its consumer, is at work."""
    consumers, slots = zip(*held, strict=True)
    connection.execute(
        """
        UPDATE pg_eventstream_slot AS s SET heartbeat = statement_timestamp()
          FROM unnest(%s::int[], %s::smallint[]) AS held (consumer_id, slot)
         WHERE (s.consumer_id, s.slot) = (held.consumer_id, held.slot) AND s.holder = %s
        """,
        [list(consumers), list(slots), holder],
    )


def begin_moving(
    connection: Connection, consumer_id: int, moves: list[Move], incarnation: int
) -> bool:
    """Begin a transaction that moves checkpoints.

    Returns False if another process or a command has moved one of them. The rows stay locked until
    the transaction ends. If another transaction has locked one, this waits for it, and then
    compares with what that has written (PostgreSQL: READ COMMITTED).
    """
    if len(moves) > 1:
        return _begin(connection, f"SELECT WHERE {_move(consumer_id, moves, incarnation)}")
    slot, epoch, old, new = moves[0]
    return _begin(
        connection,
        f"""
        UPDATE pg_eventstream_checkpoint SET position = {new:d}, incarnation = {incarnation:d}
         WHERE consumer_id = {consumer_id:d} AND slot = {slot:d} AND epoch = {epoch:d}
           AND position = {old:d}
        """,  # noqa: S608
    )


def begin_locked(connection: Connection, consumer_id: int, moves: list[Move]) -> bool:
    """Begin a transaction that locks checkpoints. Returns False if one of them was moved.

    It also marks the transaction: see `is_marked`.
    """
    return _begin(
        connection,
        f"SELECT set_config('{_MARK}', 'on', true) WHERE pg_eventstream_lock_checkpoints"
        f"({_keys(consumer_id, moves)})",
    )


def move_locked(
    connection: Connection, consumer_id: int, moves: list[Move], incarnation: int
) -> bool:
    """Move checkpoints that are locked.

    Returns False if one was moved, or if this is not the transaction any more in which
    `begin_locked` has locked them.
    """
    return _run(
        connection,
        f"SELECT WHERE current_setting('{_MARK}', true) = 'on'"
        f" AND {_move(consumer_id, moves, incarnation)}",
    )


def commit(connection: Connection) -> None:
    """Commit the transaction that was begun here. Django, whose turn it is then, has to do nothing.

    Raises `psycopg.Error`, for example for a deferred constraint.
    """
    _run(connection, "COMMIT")


def _move(consumer_id: int, moves: list[Move], incarnation: int) -> str:
    news = _array([move.new for move in sorted(moves)])
    return f"pg_eventstream_move_checkpoints({_keys(consumer_id, moves)}, {news}, {incarnation:d})"


def _keys(consumer_id: int, moves: list[Move]) -> str:
    # In the order in which a command locks them (`exclusive`), so that neither waits for the other.
    slots, epochs, olds, _ = zip(*sorted(moves), strict=True)
    return f"{consumer_id:d}, {_array(slots)}, {_array(epochs)}, {_array(olds)}"


def _array(numbers: Iterable[int]) -> str:
    return "'{" + ",".join([f"{number:d}" for number in numbers]) + "}'"


def _begin(connection: Connection, statement: str) -> bool:
    level = connection.isolation_level
    isolation = "" if level is None else f" ISOLATION LEVEL {level.name.replace('_', ' ')}"
    return _run(connection, f"BEGIN{isolation}; {statement}")


def _run(connection: Connection, statements: str) -> bool:
    """Run statements in one round trip. Returns whether the last has found or changed a row.

    psycopg's cursors send BEGIN alone, and they wait in Python, which matters in a transaction with
    one small statement. (Its pipelines take more time than they save.)
    """
    result = connection.pgconn.exec_(statements.encode())
    if result.status not in (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK):
        raise psycopg.errors.error_from_result(result)
    return bool(result.command_tuples)


def name_of(connection: Connection, consumer_id: int) -> str | None:
    """The consumer's present name. None if it was removed."""
    row = connection.execute(
        "SELECT name FROM pg_eventstream_consumer WHERE id = %s", [consumer_id]
    ).fetchone()
    return row and row[0]


def is_at(connection: Connection, consumer_id: int, slot: int, epoch: int, position: int) -> bool:
    """Whether this is the slot's checkpoint."""
    row = connection.execute(
        f"SELECT (epoch, position) = (%s, %s) FROM {CHECKPOINTS.format(consumer_id='%s')} AS c"  # noqa: S608
        " WHERE slot = %s",
        [epoch, position, consumer_id, slot],
    ).fetchone()
    return row is not None and bool(row[0])


def is_marked(connection: Connection) -> bool:
    """Whether this is still the transaction that `begin_locked` has begun."""
    (mark,) = fetch_one(connection, f"SELECT current_setting('{_MARK}', true)")
    return bool(mark == "on")


def record_failure(
    connection: Connection,
    consumer_id: int,
    slot: int,
    *,
    epoch: int,
    position: int | None,
    attempts: int,
    error: str,
    retry_seconds: float | None = None,
    stopped: bool = False,
) -> bool:
    """Write down why a slot does not go on, and when it tries again.

    Returns False, and writes nothing, if a command has changed the consumer since ``epoch``: the
    failure is then of a place where the slot might not be any more. The lock waits for a command
    that changes it now.
    """
    recorded = connection.execute(
        """
        WITH unchanged AS MATERIALIZED (
            SELECT id FROM pg_eventstream_consumer WHERE id = %s AND epoch = %s FOR SHARE
        )
        UPDATE pg_eventstream_slot AS s
           SET failing = %s, attempts = %s, error = %s, stopped = %s,
               retry_at = statement_timestamp() + make_interval(secs => %s)
          FROM unchanged WHERE s.consumer_id = unchanged.id AND s.slot = %s
        """,
        [
            consumer_id,
            epoch,
            position,
            attempts,
            storable(error, ERROR_LENGTH),
            stopped,
            retry_seconds,
            slot,
        ],
    )
    return recorded.rowcount == 1


def limit_replay(connection: Connection, consumer_id: int, slot: int, position: int) -> None:
    """Write down that events above this position are new: they were not handled before a reset."""
    connection.execute(
        "UPDATE pg_eventstream_slot SET replay_to = %(position)s"
        " WHERE consumer_id = %(id)s AND slot = %(slot)s AND replay_to > %(position)s",
        {"id": consumer_id, "slot": slot, "position": position},
    )


def forget_failure(connection: Connection, consumer_id: int, slot: int) -> None:
    connection.execute(
        """
        UPDATE pg_eventstream_slot
           SET failing = NULL, attempts = 0, error = '', stopped = false, retry_at = NULL
         WHERE consumer_id = %s AND slot = %s
        """,
        [consumer_id, slot],
    )


def park(
    connection: Connection,
    consumer_id: int,
    slot: int,
    position: int,
    *,
    error: str,
    traceback: str,
    attempts: int,
) -> bool:
    """Copy an event, so that pruning does not take it. Returns False if it is already pruned."""
    parked = connection.execute(
        """
        INSERT INTO pg_eventstream_parked (consumer_id, slot, position, channel, number, type, data,
                                           meta, created, committed_at, error, traceback, attempts)
        SELECT %s, %s, s.position, s.channel, s.eid + coalesce(s.incarnation, 0), e.type, e.data,
               e.meta, e.created, s.committed_at, %s, %s, %s
          FROM pg_eventstream_stream AS s JOIN pg_eventstream_event AS e ON e.id = s.event_id
         WHERE s.position = %s
        ON CONFLICT (consumer_id, channel, position)
        DO UPDATE SET error = excluded.error, traceback = excluded.traceback,
                      attempts = excluded.attempts, parked_at = excluded.parked_at, retry = false
        """,
        [
            consumer_id,
            slot,
            storable(error, ERROR_LENGTH),
            storable(traceback, TRACEBACK_LENGTH),
            attempts,
            position,
        ],
    )
    return parked.rowcount == 1


def storable(text: str, length: int) -> str:
    """The text without what PostgreSQL cannot store, and its end if it is longer."""
    if len(text) > length:
        text = "…" + text[1 - length :]
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()
