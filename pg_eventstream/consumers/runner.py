"""Handles the events of the slots that a process holds: one thread for each consumer.

Each transaction moves the checkpoints first. That locks their rows and compares them with what this
process believes, so it is exactly once even if another process has taken the slot meanwhile.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import django.db
import psycopg
from django.db import connections

from .. import tracing
from ..backoff import Backoff
from ..conf import conf
from ..errors import CheckpointAhead, ConsumerMissedEvents, DoNotRetry, EventStreamError
from ..limits import Limits
from ..postgres.sequence import UNKNOWN
from . import checkpoints, parked
from .checkpoints import Move, SlotState
from .declare import Consumer
from .event import event_id
from .handling import (
    ENDED,
    SlotLost,
    TransactionEnded,
    call,
    describe,
    forget_connection,
    is_broken,
    is_transient,
    moving,
    raw_connection,
)
from .measures import Measures
from .parked import ParkedEvent
from .reader import Page, Row, positions_of_page, read_data, read_page

logger = logging.getLogger(__name__)

# The pause before a slot is read again that another process has moved.
_LOST_SECONDS = 0.01
# The characters of the trace of a handler that hangs.
_TRACE_LENGTH = 1500


@dataclass(slots=True)
class _Held:
    """A slot that this process holds."""

    slot: int
    epoch: int
    #: The checkpoint, as stored.
    position: int
    incarnation: int
    #: All events up to here were read: they are handled, or in the page.
    read_to: int
    failing: int | None
    attempts: int
    error: str
    #: By `time.monotonic`, while the slot waits. Infinite if it is stopped.
    blocked_until: float
    replay_to: int
    #: The channels of which no event is handled, because an earlier one is parked.
    parked_channels: set[str]
    #: The last holder died. If it worked on an event, that had a position up to here.
    suspect_to: int | None = None
    moved_at: float = field(default_factory=time.monotonic)

    def is_blocked(self, now: float) -> bool:
        return now < self.blocked_until

    def fails_until(self, position: int) -> bool:
        """Whether attempts are counted for an event up to this position."""
        return self.failing is not None and self.failing <= position


class Runner:
    """Runs one consumer in one process.

    `grant` and `ask_back` are called by the thread that shares the slots among processes
    (`share`); all else runs on the thread that calls `run`, or `step`.
    """

    def __init__(
        self, consumer: Consumer, consumer_id: int, alias: str, holder: str, limits: Limits
    ) -> None:
        self.consumer = consumer
        self.consumer_id = consumer_id
        self._alias = alias
        self._holder = holder
        self._limits = limits
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards the next five, and `_held`
        self._granted: set[int] = set()
        self._asked_back: set[int] = set()
        self._lost: set[int] = set()
        self._given_back: set[int] = set()
        self._look_for_requests = True
        self._held: dict[int, _Held] = {}
        self._page: deque[Row] = deque()
        self._reached_end = False
        self._cursor = UNKNOWN
        self._paused = False
        #: What is held differs from what is stored, so that has to be read again.
        self._is_stale = False
        self._serve_lagging = False
        #: Events to handle in transactions of their own, after a batch failed.
        self._singly = 0
        self._transient = 0
        #: Whether everything that can be handled now is.
        self.is_idle = False
        #: Why it ended without being asked to: the consumer was removed or renamed.
        self.gone = ""
        #: The event that is being handled, and since when, by `time.monotonic`.
        self.working: tuple[Row | ParkedEvent, float] | None = None
        self.thread_id: int | None = None
        #: Of the session in which that is done. None through a pooler.
        self.backend_pid: int | None = None
        #: When it last came round its loop, by `time.monotonic`, and whether it waits there.
        self.moved_at = time.monotonic()
        self.waits = False
        self.handled = 0
        self.measures = Measures(consumer.name)
        self._traces = False
        #: Raise what a handler raises, instead of counting attempts: for `Consumer.drain`.
        self.raises = False

    # Called by other threads

    def grant(self, slots: Iterable[int]) -> None:
        """Handle the events of these slots, whose locks this process has."""
        with self._lock:
            self._granted |= {*slots}
            self.is_idle = False
        self._wake.set()

    def ask_back(self, slots: Iterable[int]) -> None:
        """Stop to handle these slots after the present transaction; see `given_back`."""
        with self._lock:
            self._asked_back |= {*slots}
        self._wake.set()

    def given_back(self) -> set[int]:
        """The slots that are not handled any more since the last call."""
        with self._lock:
            given_back, self._given_back = self._given_back, set()
        return given_back

    def lose(self) -> None:
        """The locks are gone with their session: handle nothing more until slots are granted."""
        with self._lock:
            self._lost |= {*self._held}
            self._granted, self._asked_back, self._given_back = set(), set(), set()
        self._wake.set()

    def wake(self, *, requests: bool = False) -> None:
        if requests:
            with self._lock:
                self._look_for_requests = True
        self._wake.set()

    def stop(self) -> None:
        """Finish the present transaction, and return from `run`."""
        self._stopping.set()
        self._wake.set()

    @property
    def slots(self) -> list[int]:
        with self._lock:
            return [*self._held]

    def reached(self) -> list[int]:
        """The checkpoints of the slots that it holds."""
        with self._lock:
            return [held.position for held in self._held.values()]

    # The loop

    def run(self) -> None:
        """Handle events until stopped. Errors of the database do not end it."""
        self.thread_id = threading.get_ident()
        backoff = Backoff(*self._limits.reconnect)
        try:
            while not self._stopping.is_set() and not self.gone:
                self._wake.clear()
                self.moved_at = time.monotonic()
                try:
                    seconds = self.step()
                    backoff.reset()
                except (django.db.Error, psycopg.Error) as e:
                    seconds = self._database_failed(e, backoff)
                except Exception:
                    logger.exception(
                        "consumer %s: unexpected error; trying again",
                        self.consumer.name,
                        extra={"event": "unexpected-error", "part": "consumer"},
                    )
                    self._is_stale = True
                    seconds = backoff.next()
                if seconds:
                    self.waits = True
                    self._wake.wait(seconds)
                    self.waits = False
        finally:
            self.close()
            connections.close_all()  # those of this thread

    def note_hanging(
        self, connection: psycopg.Connection[Any], row: Row | ParkedEvent, trace: str
    ) -> None:
        """Count an attempt that does not end, on the connection of another thread.

        Whoever takes over parks the event, if that was the last attempt.
        """
        if self.backend_pid is not None:
            # It could hold locks that this, and the process that takes over, would wait for.
            connection.execute("SELECT pg_terminate_backend(%s)", [self.backend_pid])
        self.measures.failed()
        error = f"The handler had not returned after {self.consumer.timeout:g} seconds."
        error = f"{error}\n{trace[-_TRACE_LENGTH:]}"
        if isinstance(row, ParkedEvent):
            parked.note_hanging(connection, row, error)
            return
        held = self._held[row.slot]
        attempts = (held.attempts if held.failing == row.position else 0) + 1
        checkpoints.record_failure(
            connection,
            self.consumer_id,
            held.slot,
            epoch=held.epoch,
            position=row.position,
            attempts=attempts,
            error=error,
            retry_seconds=self.consumer.retry.delay(attempts),
        )

    def _database_failed(self, error: Exception, backoff: Backoff) -> float:
        logger.warning(
            "consumer %s: database: %s; connecting again",
            self.consumer.name,
            str(error).strip(),
            extra={
                "event": "database-lost",
                "part": "consumer",
                "consumer": self.consumer.name,
            },
        )
        self._is_stale = True
        forget_connection(connections[self._alias])
        return backoff.next()

    def has_read(self, position: int) -> bool:
        """Whether it has read all events up to a position, or cannot now."""
        with self._lock:
            read = all(held.read_to >= position for held in self._held.values())
            return not self._granted and (read or self.is_idle)

    def close(self) -> None:
        """Write down how far all slots are, and release them."""
        self.measures.flush()
        with suppress(django.db.Error, psycopg.Error):  # it is read again
            self._write_progress([*self._held.values()])
        with self._lock:
            slots = [*self._held, *self._granted]
            self._held.clear()
            self._granted.clear()
            self._given_back |= {*slots}
        self._page.clear()
        try:
            if slots:
                checkpoints.release(self._connection(), self.consumer_id, slots, self._holder)
        except (django.db.Error, psycopg.Error) as e:
            logger.warning(
                "consumer %s: database: %s",
                self.consumer.name,
                str(e).strip(),
                extra={"event": "database-lost", "part": "consumer"},
            )

    def step(self) -> float:
        """Do what is to be done now. Returns the seconds to wait; 0 if there could be more."""
        try:
            return self._step()
        except BaseException:
            # An event that was taken from the page is not handled. It is read again.
            self._is_stale = True
            raise

    def _step(self) -> float:
        self._share()
        if self._is_stale and self._held:
            self._take(list(self._held))
        self._is_stale = False
        if self.gone or not self._held:
            self.is_idle = True
            return self._longest_rest()
        if not self._page:
            self._read()  # this also shows whether it is paused
        if self._paused:
            self._requeue()
            self.is_idle = True
            return self._longest_rest()
        if not self._is_stale and not self.gone:
            self._handle_requests()
        self._handle_page()
        self.measures.flush()
        if self._is_stale or self._page or not self._reached_end or self._has_changes():
            self.is_idle = False
            return 0
        return self._rest()

    def _rest(self) -> float:
        """Nothing is left to handle now. Write down how far that is; returns how long to wait."""
        now = time.monotonic()
        behind = [held for held in self._held.values() if held.read_to > held.position]
        due = [h for h in behind if not h.is_blocked(now)]
        wait = self._longest_rest()
        if due:
            oldest = min(held.moved_at for held in due)
            if now >= oldest + self._limits.checkpoint:
                self._write_progress(due)
            else:
                wait = min(wait, oldest + self._limits.checkpoint - now)
        blocked = [held.blocked_until for held in self._held.values() if held.is_blocked(now)]
        self.is_idle = True
        if self.thread_id is not None:
            # Those of this thread. They are not those of a program that calls `drain`.
            for other in connections.all(initialized_only=True):
                if other.alias != self._alias:
                    other.close_if_unusable_or_obsolete()
        return max(0.001, min([wait, *(until - now for until in blocked)]))

    def _longest_rest(self) -> float:
        """In case a notification was lost, and so that `moved_at` shows that it is alive."""
        return min(conf.safety_poll or math.inf, self._limits.heartbeat / 2)

    def _has_changes(self) -> bool:
        with self._lock:
            return bool(self._granted or self._asked_back or self._lost or self._look_for_requests)

    # Slots

    def _share(self) -> None:
        with self._lock:
            lost, self._lost = self._lost & {*self._held}, set()
            asked_back, self._asked_back = self._asked_back & {*self._held}, set()
            granted, self._granted = self._granted, set()
        if asked_back:
            self._write_progress([self._held[slot] for slot in asked_back])
        if lost or asked_back:
            with self._lock:
                for slot in lost | asked_back:
                    del self._held[slot]
            self._page = deque(row for row in self._page if row.slot in self._held)
            checkpoints.release(
                self._connection(), self.consumer_id, lost | asked_back, self._holder
            )
            with self._lock:
                self._given_back |= asked_back
        if granted:
            try:
                self._take([*granted])
            except BaseException:
                with self._lock:
                    self._granted |= granted
                raise

    def _take(self, slots: list[int]) -> None:
        """Read what is stored about the slots, which nobody else handles now."""
        self._requeue()
        connection = self._connection()
        self.backend_pid = checkpoints.own_pid(connection)
        states = checkpoints.take(connection, self.consumer_id, slots, self._holder)
        channels = parked.channels_of(connection, self.consumer_id, slots)
        with self._lock:
            self._look_for_requests = True
            before = {slot: self._held.pop(slot, None) for slot in slots}
            for state in states:
                self._held[state.slot] = self._hold(state, channels.get(state.slot, set()))
        for slot, known in before.items():
            held = self._held.get(slot)
            if known and held and held.epoch == known.epoch and held.position < known.position:
                self._count_undone(held, known.position)
        if len(states) < len(slots):
            self._go("it was removed, or its tables were emptied or restored in part")

    def _hold(self, state: SlotState, channels: set[str]) -> _Held:
        now = time.monotonic()
        blocked_until = 0.0 if state.retry_seconds is None else now + state.retry_seconds
        if state.stopped:
            blocked_until = float("inf")
        if self.raises:
            blocked_until = 0.0
        return _Held(
            slot=state.slot,
            epoch=state.epoch,
            position=state.position,
            incarnation=state.incarnation,
            read_to=state.position,
            failing=state.failing,
            attempts=state.attempts,
            error=state.error,
            blocked_until=blocked_until,
            replay_to=-(2**63) if state.replay_to is None else state.replay_to,
            parked_channels=channels if self.consumer.on_failure == "park-channel" else set(),
            # Which event it worked on, if any, is seen when the first is read.
            suspect_to=2**63 if state.last_holder is not None else None,
        )

    # Reading

    def _read(self) -> None:
        """Read the next page."""
        now = time.monotonic()
        ready = [held for held in self._held.values() if not held.is_blocked(now)]
        # Where no slot is ready, the page only shows whether a command has changed something.
        front = max(held.read_to for held in ready or self._held.values())
        after = min((held.read_to for held in ready), default=front)
        reach = positions_of_page(len(ready))
        if self._serve_lagging or after + reach >= front:
            self._serve_lagging = False
        else:
            # Slots that had to wait must not make the others wait until they have caught up.
            self._serve_lagging = True
            after = min(h.read_to for h in ready if h.read_to + reach >= front)
        chosen = {h.slot: h for h in ready if after <= h.read_to < after + reach}
        asked_at = time.monotonic()
        page = read_page(self._connection(), self.consumer, self.consumer_id, after, list(chosen))
        self.measures.note(page, asked_at)
        self._traces = tracing.is_on()
        self._reached_end = False
        if not self._compare(page, chosen):
            return
        for row in page.rows:
            held = chosen.get(row.slot)
            if held is not None and row.position > held.read_to:
                self._page.append(row)
        for held in chosen.values():
            held.read_to = max(held.read_to, page.last)
        self._reached_end = page.is_last and all(h.read_to >= page.last for h in ready)

    def _compare(self, page: Page, chosen: dict[int, _Held]) -> bool:
        """Whether the page can be handled: nothing but handling has changed the consumer."""
        if page.name != self.consumer.name:
            self._go(
                "it was removed"
                if page.name is None
                else f"it was renamed to {page.name!r}; this is the code from before"
            )
            return False
        self._paused = page.paused
        if any(held.epoch != page.epoch for held in self._held.values()):
            self._is_stale = True
            return False
        for held in chosen.values():
            if held.suspect_to == 2**63:
                held.suspect_to = page.cursor.position
            valid = page.cursor.valid(held.position, held.incarnation)
            if valid < held.position:
                self._refuse(
                    held,
                    CheckpointAhead(self.consumer.name, held.slot, held.position, valid),
                )
            elif (lost := page.lost.get(held.slot)) is not None and lost > held.position:
                self._refuse(held, ConsumerMissedEvents(self.consumer.name, held.slot, lost))
        if self._is_stale or any(held.is_blocked(time.monotonic()) for held in chosen.values()):
            return False
        self._cursor = page.cursor
        return True

    def _go(self, reason: str) -> None:
        self.gone = reason
        logger.warning(
            "consumer %s: %s; stopped here",
            self.consumer.name,
            reason,
            extra={"event": "consumer-gone", "consumer": self.consumer.name},
        )

    def _refuse(self, held: _Held, error: EventStreamError) -> None:
        """Stop a slot until a person has reset the consumer."""
        place = held.slot, held.epoch, held.position
        if not checkpoints.is_at(self._connection(), self.consumer_id, *place):
            # The tables were restored, so that it is this process that is ahead.
            self._is_stale = True
            return
        if self.raises:
            raise error
        logger.error(
            "consumer %s: %s",
            self.consumer.name,
            error,
            extra={
                "event": "consumer-stopped",
                "consumer": self.consumer.name,
                "slot": held.slot,
            },
        )
        self._stop_slot(held, None, held.attempts, str(error))

    def _stop_slot(self, held: _Held, position: int | None, attempts: int, error: str) -> None:
        self._record_failure(held, position, attempts, error, stopped=True)
        held.blocked_until = float("inf")
        held.read_to = held.position

    # Handling

    def _handle_page(self) -> None:
        while self._page and not self._is_stale and not self._interrupted():
            now = self.moved_at = time.monotonic()
            rows: list[Row] = []
            while self._page and len(rows) < (1 if self._singly else self.consumer.batch):
                row = self._page.popleft()
                held = self._held[row.slot]
                if held.is_blocked(now):
                    continue  # its slot reads it again
                if rows and self._is_special(held, row):
                    self._page.appendleft(row)
                    break
                if held.suspect_to is not None:
                    self._count_death(held, row)
                if self._is_exhausted(held, row):
                    self._give_up(held, row, held.error, "")
                elif row.channel in held.parked_channels:
                    self._park_after(held, row)
                else:
                    rows.append(row)
                    if held.failing == row.position:
                        break
            if rows:
                self._singly = max(0, self._singly - 1)
                self._handle(rows)

    def _is_special(self, held: _Held, row: Row) -> bool:
        """Whether the event cannot be handled in one transaction with others."""
        return (
            held.suspect_to is not None
            or held.failing == row.position
            or row.channel in held.parked_channels
        )

    def _is_exhausted(self, held: _Held, row: Row) -> bool:
        """Whether the last attempt was counted by a process that could not do what follows."""
        is_last = held.failing == row.position and held.attempts >= self.consumer.retry.attempts
        return is_last and not self.raises

    def _interrupted(self) -> bool:
        return self._stopping.is_set() or self._has_changes()

    def _handle(self, rows: list[Row]) -> None:
        """Handle events in one transaction."""
        try:
            with self._transaction(rows) as connection:
                for row in rows:
                    self._call(connection, self._held[row.slot], row)
        except SlotLost:
            self._is_stale = True
            self._wake.wait(_LOST_SECONDS)
        except (Exception, SystemExit) as e:  # noqa: BLE001
            self._failed(rows, e)
        else:
            self._transient = 0
            self.handled += len(rows)
            self.measures.handled(rows)
            self._moved({row.slot: row.position for row in rows})

    def _transaction(self, rows: list[Row]) -> AbstractContextManager[psycopg.Connection[Any]]:
        """A transaction in which these events are handled."""
        last = {row.slot: row.position for row in rows}
        moves = [
            Move(slot, self._held[slot].epoch, self._held[slot].position, position)
            for slot, position in last.items()
        ]
        forget = [slot for slot, position in last.items() if self._held[slot].fails_until(position)]
        return moving(
            self._alias,
            self.consumer_id,
            moves,
            self._cursor.incarnation,
            # Of several events, one whose handler ends the transaction must not commit a checkpoint
            # above those that follow. One that failed may have done so.
            is_locked=len(rows) > 1 or bool(forget),
            forget=forget,
        )

    def _call(self, connection: psycopg.Connection[Any], held: _Held, row: Row) -> None:
        data = row.data
        if data is None:
            data = read_data(connection, row.position)
            if data is None:
                raise SlotLost  # it is pruned, and the next page tells
        attempts = held.attempts if held.failing == row.position else 0
        event = row.event(data, replayed=row.position <= held.replay_to, attempt=attempts + 1)
        began = time.monotonic()
        self.working = row, began
        try:
            call(self.consumer, event, traces=self._traces)
        finally:
            self.working = None
            self.measures.called(time.monotonic() - began)

    def _moved(self, positions: dict[int, int]) -> None:
        now = time.monotonic()
        for slot, position in positions.items():
            held = self._held[slot]
            held.position, held.incarnation = position, self._cursor.incarnation
            # After a failure it was to be read again, and now it is parked.
            held.read_to = max(held.read_to, position)
            if held.fails_until(position):
                held.failing, held.attempts = None, 0
            held.moved_at = now

    def _write_progress(self, slots: list[_Held]) -> None:
        """Move checkpoints over events that this consumer does not handle."""
        now = time.monotonic()
        ends = {}
        for held in slots:
            waiting = next((row for row in self._page if row.slot == held.slot), None)
            end = held.read_to if waiting is None else waiting.position - 1
            if end > held.position and not held.is_blocked(now) and not self._is_stale:
                ends[held.slot] = end
        if not ends:
            return
        moves = [
            Move(slot, self._held[slot].epoch, self._held[slot].position, end)
            for slot, end in ends.items()
        ]
        try:
            with moving(self._alias, self.consumer_id, moves, self._cursor.incarnation):
                pass
        except SlotLost:
            self._is_stale = True
        else:
            for slot, end in ends.items():
                held = self._held[slot]
                held.position, held.incarnation = end, self._cursor.incarnation
                held.moved_at = now

    # Failures

    def _failed(self, rows: list[Row], error: BaseException) -> None:
        """A transaction was rolled back, or its connection was lost."""
        wrapper = connections[self._alias]
        if is_broken(wrapper) or isinstance(error, TransactionEnded):
            # It could have been committed in spite of this. If the database does not answer now,
            # this raises, and nobody is to blame but the database.
            if is_broken(wrapper):
                forget_connection(wrapper)
            before = {row.slot: self._held[row.slot].position for row in rows}
            self._take([*self._held])
            if any(self._held[slot].position != position for slot, position in before.items()):
                logger.error(
                    "consumer %s: committed, in spite of: %s",
                    self.consumer.name,
                    describe(error),
                    extra={"event": "transaction-ended", "consumer": self.consumer.name},
                )
                return
        self._requeue()
        if self.raises:
            raise error
        if len(rows) > 1:
            self._singly = len(rows)
            return
        if is_transient(error) and self._transient < self._limits.transient:
            self._transient += 1
            self._wake.wait(min(0.01 * 2**self._transient, 0.2))
            return
        self._transient = 0
        [row] = rows
        text = "".join(traceback.format_exception(error))
        self._count_attempt(
            self._held[row.slot], row, describe(error), text, isinstance(error, DoNotRetry)
        )

    def _count_undone(self, held: _Held, position: int) -> None:
        """An event that seemed to be handled was not: its handler ended the transaction."""
        self.measures.failed()
        attempts = (held.attempts if held.failing == position else 0) + 1
        held.failing, held.attempts, held.error = position, attempts, ENDED
        self._record_failure(held, position, attempts, ENDED)

    def _requeue(self) -> None:
        """Read again what was not handled."""
        self._page.clear()
        self._reached_end = False
        for held in self._held.values():
            held.read_to = held.position

    def _count_attempt(
        self, held: _Held, row: Row, error: str, trace: str, is_final: bool = False
    ) -> None:
        """An attempt failed: try again later, or do what ``on_failure`` says."""
        self.measures.failed()
        attempts = (held.attempts if held.failing == row.position else 0) + 1
        name = event_id(row.channel, row.number)
        retry = self.consumer.retry
        is_last = is_final or attempts >= retry.attempts
        logger.log(
            logging.ERROR if is_last else logging.WARNING,
            "consumer %s: event %s: attempt %d of %d failed: %s",
            self.consumer.name,
            name,
            attempts,
            retry.attempts,
            error,
            extra={
                "event": "event-not-handled",
                "consumer": self.consumer.name,
                "position": row.position,
                "attempt": attempts,
            },
        )
        held.failing, held.attempts, held.error = row.position, attempts, error
        if not is_last:
            delay = retry.delay(attempts)
            self._record_failure(held, row.position, attempts, error, retry_seconds=delay)
            held.blocked_until = time.monotonic() + delay
            held.read_to = held.position
        else:
            self._give_up(held, row, error, trace)

    def _record_failure(
        self,
        held: _Held,
        position: int | None,
        attempts: int,
        error: str,
        *,
        retry_seconds: float | None = None,
        stopped: bool = False,
    ) -> None:
        if not checkpoints.record_failure(
            self._connection(),
            self.consumer_id,
            held.slot,
            epoch=held.epoch,
            position=position,
            attempts=attempts,
            error=error,
            retry_seconds=retry_seconds,
            stopped=stopped,
        ):
            self._is_stale = True

    def _give_up(self, held: _Held, row: Row, error: str, trace: str) -> None:
        """Do what ``on_failure`` says, after the last attempt."""
        if self.consumer.on_failure == "stop":
            self._stop_slot(held, row.position, held.attempts, error)
        else:
            self._park(held, row, error, trace, held.attempts)

    def _park(self, held: _Held, row: Row, error: str, trace: str, attempts: int) -> None:
        try:
            with self._transaction([row]) as connection:
                if not checkpoints.park(
                    connection,
                    self.consumer_id,
                    held.slot,
                    row.position,
                    error=error,
                    traceback=trace,
                    attempts=attempts,
                ):
                    raise SlotLost  # it is pruned, and the next page tells
        except SlotLost:
            self._is_stale = True
            return
        if self.consumer.on_failure == "park-channel":
            held.parked_channels.add(row.channel)
        held.blocked_until = 0.0
        self._moved({held.slot: row.position})
        self.measures.parked()
        logger.error(
            "consumer %s: event %s is parked",
            self.consumer.name,
            event_id(row.channel, row.number),
            extra={
                "event": "event-parked",
                "consumer": self.consumer.name,
                "position": row.position,
            },
        )

    def _park_after(self, held: _Held, row: Row) -> None:
        error = f"An earlier event of the channel {row.channel!r} is parked."
        self._park(held, row, error, "", 0)

    def _count_death(self, held: _Held, row: Row) -> None:
        """The last holder died. It could have been this event, which is the next to be handled."""
        suspect_to, held.suspect_to = held.suspect_to, None
        if suspect_to is None or row.position > suspect_to:
            return  # it came later
        # Any of the events of a batch can be the cause.
        self._singly = max(self._singly, self.consumer.batch)
        self.measures.failed()
        attempts = (held.attempts if held.failing == row.position else 0) + 1
        error = "The process that handled it died."
        self._record_failure(held, row.position, attempts, error)
        held.failing, held.attempts, held.error = row.position, attempts, error

    # Requests

    def _handle_requests(self) -> None:
        """Handle parked events again, as a command has asked."""
        with self._lock:
            look, self._look_for_requests = self._look_for_requests, False
        if not look or self._paused:
            return
        connection, slots = self._connection(), [*self._held]
        events = parked.requested(connection, self.consumer, self.consumer_id, slots)
        if events:
            with self._lock:
                self._look_for_requests = True  # there can be more
        for event in events:
            if self._stopping.is_set():
                return
            held = self._held[event.slot]
            place = Move(held.slot, held.epoch, held.position, held.position)
            self.backend_pid = checkpoints.own_pid(self._connection())
            # If this event ends the process, no other event is to blame.
            checkpoints.release(connection, self.consumer_id, [event.slot], self._holder)
            self.working = event, time.monotonic()
            try:
                is_handled = parked.retry(
                    self._alias,
                    self.consumer,
                    self.consumer_id,
                    place,
                    event,
                    self._limits.transient,
                )
                self.handled += is_handled
                self.measures.tried_parked(is_handled=is_handled)
            except SlotLost:
                self._is_stale = True
                return
            finally:
                self.working = None
            connection = self._connection()  # another one, if the handler broke it
            checkpoints.hold(connection, self.consumer_id, event.slot, self._holder)
        channels = parked.channels_of(self._connection(), self.consumer_id, [*self._held])
        for slot, held in self._held.items():
            if self.consumer.on_failure == "park-channel":
                held.parked_channels = channels.get(slot, set())

    def _connection(self) -> psycopg.Connection[Any]:
        return raw_connection(self._alias)
