"""What a person does to a consumer: for the command and the admin.

Each function is one transaction (`exclusive`), so it takes effect between two transactions of the
consumer's handlers, wherever these run and whether or not any does. ``alias`` is the database of
the events.

They raise `UnknownConsumer`, `ConsumerBusy`, `OperationRefused`, and errors of the database
(``psycopg.Error`` and ``django.db.Error``). Nothing is changed then.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

from ..channels import is_reliable, problem_of_name
from ..errors import CheckpointAhead, EventStreamError, OperationRefused
from ..limits import LIMITS, Limits
from ..postgres.connector import fetch_one
from ..postgres.sequence import CURSOR, Cursor
from ..postgres.slots import follows_sql, slot_sql
from .checkpoints import forget_failure
from .declare import discover
from .event import event_id
from .exclusive import Change, change, notify, patient_transaction
from .handling import describe
from .targets import Target, find_position
from .trouble import (
    Failing,
    Named,
    Parked,
    find_consumer,
    held_slots,
    list_failing,
    list_parked,
    match,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
#: An error names events up to this number.
_MOST_NAMED = 10


class ResetNotPrepared(EventStreamError):
    """The function that a consumer has for `Consumer.before_reset` raised an error."""


def _done(operation: str, name: str, result: _T) -> _T:
    logger.info(
        "consumer %s: %s",
        name,
        operation,
        extra={"event": "consumer-changed", "consumer": name, "operation": operation},
    )
    return result


# Pause and resume


def pause(alias: str, name: str, limits: Limits = LIMITS) -> bool:
    """Handle no more events until `resume`. Returns False if it was paused already.

    When this returns, no handler of the consumer runs.
    """

    def work(this: Change) -> bool:
        this.execute("UPDATE pg_eventstream_consumer SET paused = true WHERE id = %s")
        return not this.paused

    return _done("pause", name, change(alias, name, work, limits))


@dataclass(frozen=True, slots=True)
class Resumed:
    was_paused: bool
    #: The number of slots that had stopped.
    stopped: int


def resume(alias: str, name: str, limits: Limits = LIMITS) -> Resumed:
    """Continue after `pause`, and try again the events at which slots have stopped."""

    def work(this: Change) -> Resumed:
        this.execute("UPDATE pg_eventstream_consumer SET paused = false WHERE id = %s")
        stopped = this.execute(
            """
            UPDATE pg_eventstream_slot
               SET failing = NULL, attempts = 0, error = '', stopped = false, retry_at = NULL
             WHERE consumer_id = %s AND stopped
            """
        )
        return Resumed(this.paused, stopped.rowcount)

    return _done("resume", name, change(alias, name, work, limits))


# Reset


@dataclass(frozen=True, slots=True)
class Reset:
    #: It continues after this position.
    position: int
    #: Events up to this position are handled again. None if it does not go back.
    replay_to: int | None
    #: The parked events that are handled again as part of the stream.
    unparked: int
    #: Whether a function of the code (`Consumer.before_reset`) has prepared it.
    prepared: bool


def reset(alias: str, name: str, target: Target, limits: Limits = LIMITS) -> Reset:
    """Continue at another place. What was handled before is handled again, as ``replayed``.

    Failures and stops are forgotten. Parked events that are handled again are not parked any more.
    The consumer's `before_reset` runs in the same transaction, on Django's connection.

    Also raises `ResetNotPrepared`, from what that has raised.
    """

    def work(this: Change) -> Reset:
        position = find_position(this.connection, target)
        cursor = _read_cursor(this)
        # What is above the end of a stream that was replaced, or is of a stream that was lost, was
        # never handled in this one.
        handled = {c.slot: cursor.valid(c.position, c.incarnation) for c in this.checkpoints}
        comparable = [cursor.valid(2**62, c.incarnation) for c in this.checkpoints]
        this.connection.execute(
            """
            UPDATE pg_eventstream_checkpoint SET position = %s, incarnation = %s
             WHERE consumer_id = %s AND slot = ANY(%s) AND epoch = %s
            """,
            [position, cursor.incarnation, this.consumer_id, list(handled), this.epoch],
        )
        slots = this.connection.execute(
            """
            UPDATE pg_eventstream_slot AS s
               SET failing = NULL, attempts = 0, error = '', stopped = false, retry_at = NULL,
                   lost = NULL,
                   replay_to = (
                       SELECT reached FROM (SELECT greatest(up.position,
                              CASE WHEN replay_to IS NOT NULL
                                   THEN least(replay_to, up.comparable) END)) AS up (reached)
                        WHERE reached > %(position)s)
              FROM unnest(%(slots)s::smallint[], %(handled)s::bigint[], %(comparable)s::bigint[])
                   AS up (slot, position, comparable)
             WHERE s.consumer_id = %(id)s AND s.slot = up.slot
         RETURNING s.replay_to
            """,
            {
                "id": this.consumer_id,
                "position": position,
                "slots": list(handled),
                "handled": list(handled.values()),
                "comparable": comparable,
            },
        ).fetchall()
        unparked = this.execute(
            """
            DELETE FROM pg_eventstream_parked AS p
             WHERE consumer_id = %s AND position > %s
               AND EXISTS (SELECT FROM pg_eventstream_stream AS s
                            WHERE s.position = p.position AND s.channel = p.channel
                              AND s.eid + coalesce(s.incarnation, 0) = p.number)
            """,
            [position],
        )
        consumer = discover().get(name)
        prepared = consumer is not None and consumer.prepares_resets
        if consumer is not None:
            try:
                consumer.prepare_reset()
            except Exception as e:
                raise ResetNotPrepared(
                    f"The consumer {name!r} was not reset, because the function that its code has"
                    f" for before_reset failed: {describe(e)}"
                ) from e
        return Reset(
            position,
            max((replay_to for (replay_to,) in slots if replay_to is not None), default=None),
            unparked.rowcount,
            prepared,
        )

    return _done("reset", name, change(alias, name, work, limits))


def _read_cursor(this: Change) -> Cursor:
    row = fetch_one(
        this.connection,
        f"SELECT c.* FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true",  # noqa: S608
    )
    return Cursor.of(*row)


# Parked events


def retry(
    alias: str, name: str, ids: Collection[str] | None = None, limits: Limits = LIMITS
) -> int:
    """Let the process that runs the consumer try parked events again, once; all with None.

    Returns their number. It is the only operation that does not wait for handlers.
    """
    with patient_transaction(alias, limits) as connection:
        consumer_id = find_consumer(connection, name)
        parked = list_parked(connection, consumer_id)
        chosen = parked if ids is None else [_find_parked(parked, name, one) for one in ids]
        consumer = discover().get(name)
        if consumer is not None and consumer.on_failure == "park-channel":
            _refuse_to_overtake(parked, chosen)
        connection.execute(
            "UPDATE pg_eventstream_parked SET retry = true WHERE consumer_id = %s AND id = ANY(%s)",
            [consumer_id, [event.pk for event in chosen]],
        )
        notify(connection)
    return _done("retry", name, len({event.pk for event in chosen}))


def _find_parked(parked: list[Parked], name: str, one: str) -> Parked:
    found = match(parked, one)
    if found is None:
        raise OperationRefused(
            f"The consumer {name!r} has not parked {one!r}. {_name_some(parked, 'Parked are')}"
        )
    return found


def _name_some(events: Collection[Named], what: str) -> str:
    if not events:
        return f"{what}: none."
    names = [event.id for event in events][:_MOST_NAMED]
    more = len(events) - len(names)
    return f"{what}: {', '.join(names)}{f' and {more:,} more' if more else ''}."


def _refuse_to_overtake(parked: list[Parked], chosen: list[Parked]) -> None:
    """Raise `OperationRefused` if an earlier event of the same channel would stay parked."""
    tried = {event.pk for event in chosen} | {event.pk for event in parked if event.retry}
    waiting: dict[str, Parked] = {}
    for event in parked:
        if event.pk not in tried:
            waiting.setdefault(event.channel, event)
    for event in chosen:
        first = waiting.get(event.channel)
        if first is not None and first.position < event.position:
            raise OperationRefused(
                f"{event.id} has to wait for {first.id}, which is parked, too: this consumer keeps"
                " the order of a channel (park-channel). Retry the earlier event as well, or all"
                " (--all), or give the earlier one up with: skip"
            )


@dataclass(frozen=True, slots=True)
class Skipped:
    id: str
    #: Whether it was parked. Otherwise its slot was failing, or had stopped, at it.
    was_parked: bool


def skip(alias: str, name: str, one: str, limits: Limits = LIMITS) -> Skipped:
    """Give up a parked event, or the event at which a slot fails or has stopped."""

    def work(this: Change) -> Skipped:
        parked = list_parked(this.connection, this.consumer_id)
        event = match(parked, one)
        if event is not None:
            this.execute(
                "DELETE FROM pg_eventstream_parked WHERE consumer_id = %s AND id = %s", [event.pk]
            )
            return Skipped(event.id, was_parked=True)
        failing = list_failing(this.connection, this.consumer_id)
        found = match(failing, one)
        if found is None:
            raise OperationRefused(
                f"The consumer {name!r} does not fail at {one!r}, and has not parked it."
                f" {_name_some([*failing, *parked], 'Events to skip')}"
            )
        incarnation = _refuse_to_skip_more(this, found)
        this.connection.execute(
            """
            UPDATE pg_eventstream_checkpoint SET position = %s, incarnation = %s
             WHERE consumer_id = %s AND slot = %s AND epoch = %s AND position < %s
            """,
            [
                found.position,
                incarnation,
                this.consumer_id,
                found.slot,
                this.epoch,
                found.position,
            ],
        )
        forget_failure(this.connection, this.consumer_id, found.slot)
        return Skipped(found.id, was_parked=False)

    return _done("skip", name, change(alias, name, work, limits))


def skip_parked(alias: str, name: str, ids: Collection[str], limits: Limits = LIMITS) -> int:
    """Give up parked events. Returns their number; if one is not parked, none is given up."""

    def work(this: Change) -> int:
        parked = list_parked(this.connection, this.consumer_id)
        chosen = {_find_parked(parked, name, one).pk for one in ids}
        this.execute(
            "DELETE FROM pg_eventstream_parked WHERE consumer_id = %s AND id = ANY(%s)",
            [list(chosen)],
        )
        return len(chosen)

    return _done("skip", name, change(alias, name, work, limits))


_BEFORE = f"""
    SELECT channel, eid + coalesce(incarnation, 0)
      FROM (SELECT * FROM pg_eventstream_stream
             WHERE position > %(checkpoint)s AND position < %(position)s
             ORDER BY position OFFSET 0) AS s
     CROSS JOIN (SELECT channels, prefixes FROM pg_eventstream_consumer WHERE id = %(id)s) AS k
     WHERE {follows_sql("s.channel", "k.channels", "k.prefixes")}
       AND {slot_sql("s.channel")} = %(slot)s
"""  # noqa: S608


def _refuse_to_skip_more(this: Change, failing: Failing) -> int:
    """Raise `OperationRefused` if other events would be skipped with the one that fails.

    It could be one of a stream that was replaced since then. Returns the present incarnation.
    """
    cursor = _read_cursor(this)
    [own] = [one for one in this.checkpoints if one.slot == failing.slot]
    valid = cursor.valid(own.position, own.incarnation)
    if valid < own.position:
        raise OperationRefused(str(CheckpointAhead(this.name, own.slot, own.position, valid)))
    rows = this.connection.execute(
        _BEFORE,
        {
            "checkpoint": own.position,
            "position": failing.position,
            "id": this.consumer_id,
            "slot": own.slot,
        },
    ).fetchall()
    before = [event_id(channel, number) for channel, number in rows if is_reliable(channel)]
    if before:
        raise OperationRefused(
            f"The consumer {this.name!r} has not handled {before[0]}, which comes before"
            f" {failing.id}: the stream was emptied, restored or replaced since it failed. Let it"
            f" try again first: manage.py eventstream_consumers resume {this.name}"
        )
    return cursor.incarnation


# Rename and remove


def rename(alias: str, old: str, new: str, limits: Limits = LIMITS) -> None:
    """Give the consumer another name. All that is stored about it stays.

    Processes whose code has the old name stop to run it, and cannot start it again.
    """

    def work(this: Change) -> None:
        if problem := problem_of_name(new):
            raise OperationRefused(f"The name {new!r} {problem}.")
        if new == old:
            raise OperationRefused(f"The consumer has the name {new!r} already.")
        taken = this.connection.execute(
            "SELECT id, name FROM pg_eventstream_consumer"
            " WHERE id <> %s AND (name = %s OR %s = ANY(former_names)) ORDER BY name <> %s",
            [this.consumer_id, new, new, new],
        ).fetchone()
        if taken is not None:
            raise OperationRefused(
                f"There is a consumer {new!r} already. If code with the new name has run too early,"
                f" stop it, and remove what it has stored: manage.py eventstream_consumers remove"
                f" {new}"
                if taken[1] == new
                else f"{new!r} is a former name of the consumer {taken[1]!r}, and code that still"
                " has it would run this one. Choose another name."
            )
        this.execute(
            """
            UPDATE pg_eventstream_consumer AS k
               SET name = new.name,
                   former_names = array_append(array_remove(former_names, new.name), old.name)
              FROM (SELECT %s::int AS id, %s::text AS name) AS new, (SELECT %s::text AS name) AS old
             WHERE k.id = new.id
            """,
            [new, old],
        )

    _done("rename", old, change(alias, old, work, limits))


@dataclass(frozen=True, slots=True)
class Usage:
    """Why a consumer might still be needed."""

    #: Where the code of this project declares it.
    declared_at: str | None
    #: How many of its slots processes hold now.
    held_slots: int


def usage(alias: str, name: str, limits: Limits = LIMITS) -> Usage:
    with patient_transaction(alias, limits) as connection:
        held = held_slots(connection, find_consumer(connection, name))
    consumer = discover().get(name)
    return Usage(consumer.place if consumer else None, len(held))


def remove(alias: str, name: str, limits: Limits = LIMITS) -> None:
    """Delete all that is stored about the consumer, its parked events too.

    Processes that run it stop to do so. If its code is started again, it begins as a new consumer.
    Raises `OperationRefused` if the role may not: running consumers does not need this right.
    """

    def work(this: Change) -> None:
        may_delete, role = fetch_one(
            this.connection,
            "SELECT has_table_privilege('pg_eventstream_consumer', 'DELETE'),"
            " quote_ident(current_user)",
        )
        if not may_delete:
            raise OperationRefused(
                f"Nothing was removed: the role {role} may not delete consumers. As the owner of"
                f" the tables, run: GRANT DELETE ON pg_eventstream_consumer TO {role}"
            )
        for table in ("parked", "slot", "checkpoint"):
            this.execute(f"DELETE FROM pg_eventstream_{table} WHERE consumer_id = %s")  # noqa: S608
        this.execute("DELETE FROM pg_eventstream_consumer WHERE id = %s")

    _done("remove", name, change(alias, name, work, limits))
