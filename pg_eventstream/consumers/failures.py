"""What follows when an event could not be handled: attempts are counted, and it is given up."""

from __future__ import annotations

import logging
import math
import time
import traceback

from ..errors import DoNotRetry, EventStreamError
from . import checkpoints, parked
from .checkpoints import Connection
from .declaration import Declaration
from .event import event_id
from .handling import ENDED, SlotLost, describe
from .held import Held, HeldSlots
from .measures import Measures
from .parked import ParkedEvent
from .reader import Row

logger = logging.getLogger(__name__)

_DIED = "The process that handled it died."
# The characters of the trace of a handler that hangs.
_TRACE_LENGTH = 1500


class Failures:
    """Counts the attempts of one consumer's events, and does what ``on_failure`` says.

    All methods write to the database, and all raise `SlotLost` if another process or a command has
    changed what the failure belongs to.
    """

    def __init__(
        self, consumer: Declaration, consumer_id: int, slots: HeldSlots, measures: Measures
    ) -> None:
        self._consumer = consumer
        self._consumer_id = consumer_id
        self._slots = slots
        self._measures = measures

    def count(self, held: Held, row: Row, error: BaseException) -> None:
        """An attempt failed: try again later, or give the event up."""
        retry = self._consumer.retry
        text = describe(error)
        attempts = self._note(held, row.position, text)
        is_last = isinstance(error, DoNotRetry) or attempts >= retry.attempts
        logger.log(
            logging.ERROR if is_last else logging.WARNING,
            "consumer %s: event %s: attempt %d of %d failed: %s",
            self._consumer.name,
            event_id(row.channel, row.number),
            attempts,
            retry.attempts,
            text,
            extra={
                "event": "event-not-handled",
                "consumer": self._consumer.name,
                "position": row.position,
                "attempt": attempts,
            },
        )
        if is_last:
            self.give_up(held, row, "".join(traceback.format_exception(error)))
            return
        delay = retry.delay(attempts)
        held.blocked_until = time.monotonic() + delay
        held.read_to = held.position
        self._record(held, row.position, retry_seconds=delay)

    def count_death(self, held: Held, row: Row) -> bool:
        """The last holder died. It could have been this event, which is the next to be handled.

        Returns False if the event came later.
        """
        suspect_to, held.suspect_to = held.suspect_to, None
        if suspect_to is None or row.position > suspect_to:
            return False
        self._note(held, row.position, _DIED)
        self._record(held, row.position)
        return True

    def count_undone(self, held: Held, position: int) -> None:
        """An event that seemed to be handled was not: its handler ended the transaction."""
        self._note(held, position, ENDED)
        self._record(held, position)

    def note_hanging(self, connection: Connection, row: Row | ParkedEvent, trace: str) -> None:
        """Count an attempt that does not end, on the connection of another thread.

        If that was the last attempt, the process that takes over parks the event.
        """
        self._measures.failed()
        error = f"The handler had not returned after {self._consumer.timeout:g} seconds."
        error = f"{error}\n{trace[-_TRACE_LENGTH:]}"
        if isinstance(row, ParkedEvent):
            parked.note_hanging(connection, row, error)
            return
        held = self._slots[row.slot]
        attempts = held.attempts_at(row.position) + 1
        checkpoints.record_failure(
            connection,
            self._consumer_id,
            held.slot,
            epoch=held.epoch,
            position=row.position,
            attempts=attempts,
            error=error,
            retry_seconds=self._consumer.retry.delay(attempts),
        )

    def is_exhausted(self, held: Held, row: Row) -> bool:
        """Whether the last attempt was counted by a process that could not do what follows."""
        attempts = held.attempts_at(row.position)
        # It could also have died before it began with this event, or long before a backup was
        # restored that remembers it. Two deaths at the same event are no chance.
        if attempts == 1 and held.error == _DIED:
            return False
        return attempts >= self._consumer.retry.attempts

    def give_up(self, held: Held, row: Row, trace: str = "") -> None:
        """Do what ``on_failure`` says, after the last attempt."""
        if self._consumer.on_failure == "stop":
            self._stop(held, row.position)
        else:
            self._park(held, row, held.error, trace, held.attempts)

    def park_after(self, held: Held, row: Row) -> None:
        """Park an event because an earlier one of its channel is parked."""
        self._park(held, row, f"An earlier event of the channel {row.channel!r} is parked.", "", 0)

    def refuse(self, held: Held, error: EventStreamError) -> None:
        """Stop a slot until a person has reset the consumer."""
        logger.error(
            "consumer %s: %s",
            self._consumer.name,
            error,
            extra={
                "event": "consumer-stopped",
                "consumer": self._consumer.name,
                "slot": held.slot,
            },
        )
        held.error = str(error)
        self._stop(held, None)

    def _note(self, held: Held, position: int, error: str) -> int:
        """Returns the number of attempts, with this one."""
        self._measures.failed()
        attempts = held.attempts_at(position) + 1
        held.failing, held.attempts, held.error = position, attempts, error
        return attempts

    def _stop(self, held: Held, position: int | None) -> None:
        held.blocked_until = math.inf
        held.read_to = held.position
        self._record(held, position, stopped=True)

    def _record(
        self,
        held: Held,
        position: int | None,
        *,
        retry_seconds: float | None = None,
        stopped: bool = False,
    ) -> None:
        if not checkpoints.record_failure(
            self._slots.connection(),
            self._consumer_id,
            held.slot,
            epoch=held.epoch,
            position=position,
            attempts=held.attempts,
            error=held.error,
            retry_seconds=retry_seconds,
            stopped=stopped,
        ):
            raise SlotLost

    def _park(self, held: Held, row: Row, error: str, trace: str, attempts: int) -> None:
        with self._slots.transaction([row]) as connection:
            if not checkpoints.park(
                connection,
                self._consumer_id,
                held.slot,
                row.position,
                error=error,
                traceback=trace,
                attempts=attempts,
            ):
                raise SlotLost  # it is pruned, and the next page tells
        if self._consumer.on_failure == "park-channel":
            held.parked_channels.add(row.channel)
        held.blocked_until = 0.0
        self._slots.moved([row])
        self._measures.parked()
        logger.error(
            "consumer %s: event %s is parked",
            self._consumer.name,
            event_id(row.channel, row.number),
            extra={
                "event": "event-parked",
                "consumer": self._consumer.name,
                "position": row.position,
            },
        )
