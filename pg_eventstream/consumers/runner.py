"""Handles the events of the slots that a process holds: one thread for each consumer.

Each transaction moves the checkpoints first. That locks their rows and compares them with what this
process believes, so it is exactly once even if another process has taken the slot meanwhile.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

import django.db
import psycopg
from django.db import connections

from .. import tracing
from ..backoff import Backoff
from ..conf import conf
from ..errors import CheckpointAhead, ConsumerMissedEvents, EventStreamError
from ..limits import Limits
from ..postgres.sequence import UNKNOWN
from . import checkpoints, parked
from .checkpoints import Connection
from .declaration import Declaration
from .event import ConsumedEvent
from .failures import Failures
from .handling import (
    SlotLost,
    TransactionEnded,
    call,
    describe,
    forget_connection,
    is_broken,
    is_transient,
)
from .held import Held, HeldSlots
from .measures import Measures
from .parked import ParkedEvent
from .reader import Page, Row, positions_of_page, read_data, read_page

logger = logging.getLogger(__name__)

# The pause before a slot is read again that another process has moved.
_LOST_SECONDS = 0.01
# No event has this position.
_BEYOND = 2**62


class Runner:
    """Runs one consumer in one process.

    `grant` and `ask_back` are called by the thread that shares the slots among processes
    (`share`); all else runs on the thread that calls `run`, or `step`.
    """

    def __init__(
        self, consumer: Declaration, consumer_id: int, alias: str, holder: str, limits: Limits
    ) -> None:
        self.consumer = consumer
        self.consumer_id = consumer_id
        self._alias = alias
        self._holder = holder
        self._limits = limits
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards the next five
        self._granted: set[int] = set()
        self._asked_back: set[int] = set()
        self._lost: set[int] = set()
        self._given_back: set[int] = set()
        self._look_for_requests = True
        self._slots = HeldSlots(alias, consumer_id)
        self._page: deque[Row] = deque()
        self._reached_end = False
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
        self._failures = Failures(consumer, consumer_id, self._slots, self.measures)
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
            self._lost |= {*self._slots.numbers()}
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
        return self._slots.numbers()

    def reached(self) -> list[int]:
        """The checkpoints of the slots that it holds."""
        return [position for position, _ in self._slots.places()]

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

    def note_hanging(self, connection: Connection, row: Row | ParkedEvent, trace: str) -> None:
        """Count an attempt that does not end, on the connection of another thread."""
        if self.backend_pid is not None:
            # It could hold locks that this, and the process that takes over, would wait for.
            connection.execute("SELECT pg_terminate_backend(%s)", [self.backend_pid])
        self._failures.note_hanging(connection, row, trace)

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
        read = all(read_to >= position for _, read_to in self._slots.places())
        with self._lock:
            return not self._granted and (read or self.is_idle)

    def close(self) -> None:
        """Write down how far all slots are, and release them."""
        self.measures.flush()
        with suppress(django.db.Error, psycopg.Error):  # it is read again
            self._write_progress(self._slots)
        held = self._slots.replace(self._slots.numbers(), [])
        with self._lock:
            slots = [*held, *self._granted]
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
        except SlotLost:
            self._is_stale = True
            self._wake.wait(_LOST_SECONDS)
            return 0
        except BaseException:
            # An event that was taken from the page is not handled. It is read again.
            self._is_stale = True
            raise

    def _step(self) -> float:
        self._share()
        if self._is_stale and self._slots:
            self._take(self.slots)
        self._is_stale = False
        if self.gone or not self._slots:
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
        behind = [held for held in self._slots if held.read_to > held.position]
        due = [h for h in behind if not h.is_blocked(now)]
        wait = self._longest_rest()
        if due:
            oldest = min(held.moved_at for held in due)
            if now >= oldest + self._limits.checkpoint:
                self._write_progress(due)
            else:
                wait = min(wait, oldest + self._limits.checkpoint - now)
        blocked = [held.blocked_until for held in self._slots if held.is_blocked(now)]
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
            lost, self._lost = self._lost & {*self.slots}, set()
            asked_back, self._asked_back = self._asked_back & {*self.slots}, set()
            granted, self._granted = self._granted, set()
        if asked_back:
            self._write_progress([self._slots[slot] for slot in asked_back])
        if lost or asked_back:
            self._slots.replace(lost | asked_back, [])
            self._page = deque(row for row in self._page if row.slot in self._slots)
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
        channels = self._parked_channels(slots)
        with self._lock:
            self._look_for_requests = True
        before = self._slots.replace(
            slots,
            [
                Held.of(state, channels.get(state.slot, set()), waits=not self.raises)
                for state in states
            ],
        )
        for state in states:
            known = before.get(state.slot)
            if known and (known.epoch, known.moved_from) == (state.epoch, state.position):
                self._failures.count_undone(self._slots[state.slot], known.position)
        if len(states) < len(slots):
            name = checkpoints.name_of(connection, self.consumer_id)
            self._go(
                "it was removed" if name is None else "its tables were emptied or restored in part"
            )

    def _parked_channels(self, slots: list[int]) -> dict[int, set[str]]:
        """By slot, the channels of which no event is handled."""
        if self.consumer.on_failure != "park-channel":
            return {}
        return parked.channels_of(self._connection(), self.consumer_id, slots)

    # Reading

    def _read(self) -> None:
        """Read the next page."""
        now = time.monotonic()
        ready = [held for held in self._slots if not held.is_blocked(now)]
        front = max((held.read_to for held in ready), default=_BEYOND)
        # Where no slot is ready, the page only shows whether a command has changed something.
        after = min((held.read_to for held in ready), default=_BEYOND)
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

    def _compare(self, page: Page, chosen: dict[int, Held]) -> bool:
        """Whether the page can be handled: nothing but handling has changed the consumer."""
        if page.name != self.consumer.name:
            self._go(
                "it was removed"
                if page.name is None
                else f"it was renamed to {page.name!r}; this is the code from before"
            )
            return False
        self._paused = page.paused
        if any(held.epoch != page.epoch for held in self._slots):
            self._is_stale = True
            return False
        known, self._slots.cursor = self._slots.cursor, page.cursor
        if known is not UNKNOWN and not page.cursor.follows(known):
            # How far it was read says nothing about the new stream. Where a checkpoint is ahead of
            # that, the next page shows it.
            self._requeue()
            return False
        for held in chosen.values():
            held.note_end(page.cursor.position)
            replay_to = page.cursor.valid(held.replay_to, held.incarnation)
            if replay_to < held.replay_to:
                held.replay_to = replay_to
                checkpoints.limit_replay(self._connection(), self.consumer_id, held.slot, replay_to)
            valid = page.cursor.valid(held.position, held.incarnation)
            if valid < held.position:
                self._refuse(
                    held,
                    CheckpointAhead(self.consumer.name, held.slot, held.position, valid),
                )
            elif (lost := page.lost.get(held.slot)) is not None and lost > held.position:
                self._refuse(held, ConsumerMissedEvents(self.consumer.name, held.slot, lost))
        now = time.monotonic()
        return not (self._is_stale or any(held.is_blocked(now) for held in chosen.values()))

    def _go(self, reason: str) -> None:
        self.gone = reason
        logger.warning(
            "consumer %s: %s; stopped here",
            self.consumer.name,
            reason,
            extra={"event": "consumer-gone", "consumer": self.consumer.name},
        )

    def _refuse(self, held: Held, error: EventStreamError) -> None:
        place = held.slot, held.epoch, held.position
        if not checkpoints.is_at(self._connection(), self.consumer_id, *place):
            # The tables were restored, so that it is this process that is ahead.
            self._is_stale = True
        elif self.raises:
            raise error
        else:
            self._failures.refuse(held, error)

    # Handling

    def _handle_page(self) -> None:
        while self._page and not self._is_stale and not self._interrupted():
            self.moved_at = time.monotonic()
            rows = self._next_rows()
            if rows:
                self._singly = max(0, self._singly - 1)
                self._handle(rows)

    def _next_rows(self) -> list[Row]:
        """Take the events of the next transaction from the page. Park those that are given up."""
        now = time.monotonic()
        rows: list[Row] = []
        while self._page and len(rows) < (1 if self._singly else self.consumer.batch):
            row = self._page.popleft()
            held = self._slots[row.slot]
            if held.is_blocked(now):
                continue  # its slot reads it again
            if self._is_plain(held, row):
                rows.append(row)
                continue
            if rows:
                self._page.appendleft(row)
                break
            if held.suspect_to is not None and self._failures.count_death(held, row):
                # Any of the events of a batch can be the cause.
                self._singly = max(self._singly, self.consumer.batch)
            if not self.raises and self._failures.is_exhausted(held, row):
                self._failures.give_up(held, row)
            elif row.channel in held.parked_channels:
                self._failures.park_after(held, row)
            else:
                rows.append(row)
                if held.failing == row.position:
                    break
        return rows

    def _is_plain(self, held: Held, row: Row) -> bool:
        """Whether the event can be handled in one transaction with others."""
        return (
            held.suspect_to is None
            and held.failing != row.position
            and row.channel not in held.parked_channels
        )

    def _interrupted(self) -> bool:
        return self._stopping.is_set() or self._has_changes()

    def _handle(self, rows: list[Row]) -> None:
        """Handle events in one transaction."""
        # All at once: between the statements of handlers, this code would not be in the processor's
        # caches any more.
        events = [None if row.data is None else self._event(row, row.data) for row in rows]
        try:
            with self._slots.transaction(rows) as connection:
                self._call(connection, rows, events)
        except SlotLost:
            raise
        except (Exception, SystemExit) as e:  # noqa: BLE001
            self._failed(rows, e)
        else:
            self._transient = 0
            self.handled += len(rows)
            self.measures.handled(rows)
            self._slots.moved(rows)

    def _event(self, row: Row, data: str) -> ConsumedEvent:
        held = self._slots[row.slot]
        return row.event(
            data,
            replayed=row.position <= held.replay_to,
            attempt=held.attempts_at(row.position) + 1,
        )

    def _call(
        self, connection: Connection, rows: list[Row], events: list[ConsumedEvent | None]
    ) -> None:
        """Call the handler with each event. Where there is none, its data are large."""
        seconds = []
        began = time.monotonic()
        try:
            for row, event in zip(rows, events, strict=True):
                if event is None:
                    event = self._read_large(connection, row)
                    began = time.monotonic()
                self.working = row, began
                call(self.consumer, event, traces=self._traces)
                ended = time.monotonic()
                seconds.append(ended - began)
                began = ended
        except BaseException:
            seconds.append(time.monotonic() - began)
            raise
        finally:
            self.working = None
            self.measures.called(seconds)

    def _read_large(self, connection: Connection, row: Row) -> ConsumedEvent:
        data = read_data(connection, row.position)
        if data is None:
            raise SlotLost  # it is pruned, and the next page tells
        return self._event(row, data)

    def _write_progress(self, slots: Iterable[Held]) -> None:
        """Move checkpoints over events that this consumer does not handle."""
        now = time.monotonic()
        ends = {}
        for held in slots:
            waiting = next((row for row in self._page if row.slot == held.slot), None)
            end = held.read_to if waiting is None else waiting.position - 1
            if end > held.position and not held.is_blocked(now) and not self._is_stale:
                ends[held.slot] = end
        if ends:
            try:
                self._slots.pass_over(ends)
            except SlotLost:
                self._is_stale = True

    # Failures

    def _failed(self, rows: list[Row], error: BaseException) -> None:
        """A transaction was rolled back, or its connection was lost."""
        wrapper = connections[self._alias]
        if is_broken(wrapper) or isinstance(error, TransactionEnded):
            # It could have been committed in spite of this. If the database does not answer now,
            # this raises, and nobody is to blame but the database.
            if is_broken(wrapper):
                forget_connection(wrapper)
            before = {row.slot: self._slots[row.slot].position for row in rows}
            self._take(self.slots)
            if any(self._slots[slot].position != position for slot, position in before.items()):
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
        self._failures.count(self._slots[row.slot], row, error)

    def _requeue(self) -> None:
        """Read again what was not handled."""
        self._page.clear()
        self._reached_end = False
        for held in self._slots:
            held.read_to = held.position

    # Requests

    def _handle_requests(self) -> None:
        """Handle parked events again, as a command has asked."""
        with self._lock:
            look, self._look_for_requests = self._look_for_requests, False
        if not look or self._paused:
            return
        connection = self._connection()
        events = parked.requested(connection, self.consumer, self.consumer_id, self.slots)
        if events:
            with self._lock:
                self._look_for_requests = True  # there can be more
        for event in events:
            if self._stopping.is_set():
                return
            self.backend_pid = checkpoints.own_pid(self._connection())
            # If this event ends the process, no other event is to blame.
            checkpoints.release(connection, self.consumer_id, [event.slot], self._holder)
            self.working = event, time.monotonic()
            try:
                is_handled = parked.retry(
                    self._alias,
                    self.consumer,
                    self.consumer_id,
                    self._slots.place(event.slot),
                    event,
                    self._limits.transient,
                )
                self.handled += is_handled
                self.measures.tried_parked(is_handled=is_handled)
            finally:
                self.working = None
            connection = self._connection()  # another one, if the handler broke it
            checkpoints.hold(connection, self.consumer_id, event.slot, self._holder)
        channels = self._parked_channels(self.slots)
        for held in self._slots:
            held.parked_channels = channels.get(held.slot, set())

    def _connection(self) -> Connection:
        return self._slots.connection()
