"""Parked events: those that a consumer could not handle."""

from __future__ import annotations

import logging
import traceback
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from django.db import connections, transaction

from .. import tracing
from ..postgres.connector import fetch_one
from . import checkpoints
from .checkpoints import Connection, Move, storable
from .declaration import Declaration
from .event import event_id
from .handling import (
    SlotLost,
    call,
    check_transaction,
    describe,
    forget_connection,
    is_broken,
    is_transient,
    raw_connection,
)
from .reader import make_event

logger = logging.getLogger(__name__)

_REQUESTED = """
    SELECT id, slot, position, channel, number, type, data, meta::text, created, committed_at,
           attempts
      FROM pg_eventstream_parked
     WHERE consumer_id = %s AND retry AND slot = ANY(%s)
     ORDER BY position LIMIT 100
"""


_REFUSE_TO_OVERTAKE = """
    UPDATE pg_eventstream_parked AS p SET retry = false
     WHERE consumer_id = %s AND retry AND slot = ANY(%s)
       AND EXISTS (SELECT FROM pg_eventstream_parked AS earlier
                    WHERE earlier.consumer_id = p.consumer_id AND earlier.channel = p.channel
                      AND earlier.position < p.position AND NOT earlier.retry)
"""


@dataclass(frozen=True, slots=True)
class ParkedEvent:
    """A parked event that is to be tried again."""

    id: int
    slot: int
    position: int
    channel: str
    number: int
    type: str
    data: str
    meta: str | None
    created: datetime
    committed_at: datetime | None
    attempts: int


def requested(
    connection: Connection, consumer: Declaration, consumer_id: int, slots: Collection[int]
) -> list[ParkedEvent]:
    """Events that a command has asked to try again, in order. Up to 100."""
    if consumer.on_failure == "park-channel":
        # The command refuses this, but it cannot know what the code of this process declares.
        connection.execute(_REFUSE_TO_OVERTAKE, [consumer_id, list(slots)])
    rows = connection.execute(_REQUESTED, [consumer_id, list(slots)]).fetchall()
    return [ParkedEvent(*row) for row in rows]


def is_requested(connection: Connection, consumer_ids: Collection[int]) -> bool:
    """Whether parked events of these consumers are to be tried again, unless it is paused."""
    (found,) = fetch_one(
        connection,
        """
        SELECT EXISTS (SELECT FROM pg_eventstream_parked
                        WHERE consumer_id IN (SELECT id FROM pg_eventstream_consumer
                                               WHERE id = ANY(%s) AND NOT paused)
                          AND retry)
        """,
        [list(consumer_ids)],
    )
    return bool(found)


def channels_of(
    connection: Connection, consumer_id: int, slots: Collection[int]
) -> dict[int, set[str]]:
    """The channels of parked events, by slot."""
    rows = connection.execute(
        "SELECT DISTINCT slot, channel FROM pg_eventstream_parked"
        " WHERE consumer_id = %s AND slot = ANY(%s)",
        [consumer_id, list(slots)],
    ).fetchall()
    channels: defaultdict[int, set[str]] = defaultdict(set)
    for slot, channel in rows:
        channels[slot].add(channel)
    return channels


def retry(
    alias: str,
    consumer: Declaration,
    consumer_id: int,
    place: Move,
    event: ParkedEvent,
    transient: int,
) -> bool:
    """Try a parked event once. Returns whether it was handled; otherwise it stays parked.

    ``place`` is the slot's checkpoint, which does not move. A serialization failure or a deadlock
    does not count, up to ``transient`` times. Raises `SlotLost` if the process does not hold the
    slot any more; the event is then still to be tried.
    """
    connection = raw_connection(alias)
    # First, so that an event that ends the process is not tried again without being asked.
    begun = connection.execute(
        "UPDATE pg_eventstream_parked SET retry = false, attempts = attempts + 1"
        " WHERE id = %s AND retry",
        [event.id],
    )
    if not begun.rowcount:
        return False
    while True:
        try:
            if not _handle(alias, consumer, consumer_id, place, event):
                return False
        except SlotLost:
            raw_connection(alias).execute(
                "UPDATE pg_eventstream_parked SET retry = true, attempts = attempts - 1"
                " WHERE id = %s AND NOT retry",
                [event.id],
            )
            raise
        except (Exception, SystemExit) as e:  # noqa: BLE001
            if is_transient(e) and transient > 0:
                transient -= 1
                continue
            if is_broken(connections[alias]):
                # If the database does not answer now, this raises, and the error is not written.
                forget_connection(connections[alias])
            _still_parked(raw_connection(alias), consumer, consumer_id, event, e)
            return False
        break
    logger.info(
        "consumer %s: parked event %s is handled",
        consumer.name,
        event_id(event.channel, event.number),
        extra={
            "event": "parked-event-handled",
            "consumer": consumer.name,
            "position": event.position,
        },
    )
    return True


def _handle(
    alias: str,
    consumer: Declaration,
    consumer_id: int,
    place: Move,
    event: ParkedEvent,
) -> bool:
    """Handle a parked event, and delete it. Returns False if it is not there any more."""
    with transaction.atomic(using=alias):
        connection = raw_connection(alias)
        if not checkpoints.begin_locked(connection, consumer_id, [place]):
            raise SlotLost
        # This lock shows which event is tried (`exclusive`), and lets `note_hanging` write.
        found = connection.execute(
            "SELECT FROM pg_eventstream_parked WHERE id = %s FOR KEY SHARE", [event.id]
        )
        if not found.rowcount:
            return False
        again = make_event(
            event.channel,
            event.number,
            event.type,
            event.data,
            event.meta,
            event.position,
            event.created,
            event.committed_at,
            replayed=False,
            attempt=event.attempts + 1,
        )
        call(consumer, again, traces=tracing.is_on())
        check_transaction(alias, connection)
        connection.execute("DELETE FROM pg_eventstream_parked WHERE id = %s", [event.id])
    return True


def note_hanging(connection: Connection, event: ParkedEvent, error: str) -> None:
    """Write down that its handler did not return, on the connection of another thread."""
    connection.execute(
        "UPDATE pg_eventstream_parked SET error = %s, traceback = '' WHERE id = %s",
        [storable(error, checkpoints.ERROR_LENGTH), event.id],
    )


def _still_parked(
    connection: Connection,
    consumer: Declaration,
    consumer_id: int,
    event: ParkedEvent,
    error: BaseException,
) -> None:
    connection.execute(
        "UPDATE pg_eventstream_parked SET error = %s, traceback = %s WHERE id = %s",
        [
            storable(describe(error), checkpoints.ERROR_LENGTH),
            storable("".join(traceback.format_exception(error)), checkpoints.TRACEBACK_LENGTH),
            event.id,
        ],
    )
    if consumer.on_failure == "park-channel":
        # Its later events wait for it.
        connection.execute(
            "UPDATE pg_eventstream_parked SET retry = false"
            " WHERE consumer_id = %s AND channel = %s AND retry",
            [consumer_id, event.channel],
        )
    logger.warning(
        "consumer %s: parked event %s failed again: %s",
        consumer.name,
        event_id(event.channel, event.number),
        describe(error),
        extra={
            "event": "parked-event-failed",
            "consumer": consumer.name,
            "position": event.position,
        },
    )
