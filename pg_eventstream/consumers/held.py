"""The slots that a process holds of a consumer, and the transactions that move checkpoints."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from ..postgres.sequence import UNKNOWN
from .checkpoints import Connection, Move, SlotState
from .handling import moving, raw_connection
from .reader import Row

#: Before the first page shows where the stream ends.
_ANYWHERE = 2**63


@dataclass(slots=True)
class Held:
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
    #: The checkpoint before it was last moved.
    moved_from: int | None = None
    moved_at: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, state: SlotState, parked_channels: set[str], *, waits: bool) -> Held:
        """A slot as it is stored. ``waits`` is false if attempts are made without a pause."""
        blocked_until = 0.0
        if waits and state.stopped:
            blocked_until = math.inf
        elif waits and state.retry_seconds is not None:
            blocked_until = time.monotonic() + state.retry_seconds
        return cls(
            slot=state.slot,
            epoch=state.epoch,
            position=state.position,
            incarnation=state.incarnation,
            read_to=state.position,
            failing=state.failing,
            attempts=state.attempts,
            error=state.error,
            blocked_until=blocked_until,
            replay_to=-_ANYWHERE if state.replay_to is None else state.replay_to,
            parked_channels=parked_channels,
            # Which event it worked on, if any, is seen when the first is read.
            suspect_to=None if state.last_holder is None else _ANYWHERE,
        )

    def is_blocked(self, now: float) -> bool:
        return now < self.blocked_until

    def fails_until(self, position: int) -> bool:
        """Whether attempts are counted for an event up to this position."""
        return self.failing is not None and self.failing <= position

    def attempts_at(self, position: int) -> int:
        """The attempts that are counted for the event at this position."""
        return self.attempts if self.failing == position else 0

    def note_end(self, position: int) -> None:
        """The stream ends here. If the last holder died, it was at an event before that."""
        if self.suspect_to == _ANYWHERE:
            self.suspect_to = position


class HeldSlots:
    """The held slots by number. Only the thread that handles their events changes them."""

    def __init__(self, alias: str, consumer_id: int) -> None:
        self._alias = alias
        self._consumer_id = consumer_id
        self._lock = threading.Lock()  # for other threads, which only look
        self._slots: dict[int, Held] = {}
        #: The end of the stream, as last seen.
        self.cursor = UNKNOWN

    def __getitem__(self, slot: int) -> Held:
        return self._slots[slot]

    def __iter__(self) -> Iterator[Held]:
        return iter(self._slots.values())

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def numbers(self) -> list[int]:
        """Can be called by any thread, as the next one."""
        with self._lock:
            return [*self._slots]

    def places(self) -> list[tuple[int, int]]:
        """The checkpoint of each slot, and how far it was read."""
        with self._lock:
            return [(held.position, held.read_to) for held in self._slots.values()]

    def replace(self, slots: Iterable[int], new: Iterable[Held]) -> dict[int, Held]:
        """Put these in the place of some slots. Returns those that were held before."""
        with self._lock:
            before = {slot: self._slots.pop(slot) for slot in slots if slot in self._slots}
            self._slots.update({held.slot: held for held in new})
        return before

    def connection(self) -> Connection:
        """Django's connection of this thread."""
        return raw_connection(self._alias)

    def transaction(self, rows: Collection[Row]) -> AbstractContextManager[Connection]:
        """A transaction in which these events are handled. See `handling.moving`."""
        ends = {row.slot: row.position for row in rows}
        forget = [slot for slot, end in ends.items() if self._slots[slot].fails_until(end)]
        # Of several events, one whose handler ends the transaction must not commit a checkpoint
        # above those that follow. One that failed may have done so.
        return self._moving(ends, is_locked=len(rows) > 1 or bool(forget), forget=forget)

    def moved(self, rows: Iterable[Row]) -> None:
        """The transaction that has handled these events, or parked them, is committed."""
        ends = {row.slot: row.position for row in rows}
        self._moved(ends)
        for slot, end in ends.items():
            held = self._slots[slot]
            # After a failure it was to be read again, and now it is parked.
            held.read_to = max(held.read_to, end)
            if held.fails_until(end):
                held.failing, held.attempts = None, 0

    def pass_over(self, ends: Mapping[int, int]) -> None:
        """Move checkpoints to these positions, over events that the consumer does not handle.

        Raises `SlotLost`.
        """
        with self._moving(ends):
            pass
        self._moved(ends)

    def place(self, slot: int) -> Move:
        """The slot's checkpoint, which does not move."""
        return self._move(slot, self._slots[slot].position)

    def _move(self, slot: int, end: int) -> Move:
        held = self._slots[slot]
        return Move(slot, held.epoch, held.position, end)

    def _moving(
        self, ends: Mapping[int, int], *, is_locked: bool = False, forget: Iterable[int] = ()
    ) -> AbstractContextManager[Connection]:
        return moving(
            self._alias,
            self._consumer_id,
            [self._move(slot, end) for slot, end in ends.items()],
            self.cursor.incarnation,
            is_locked=is_locked,
            forget=forget,
        )

    def _moved(self, ends: Mapping[int, int]) -> None:
        now = time.monotonic()
        for slot, end in ends.items():
            held = self._slots[slot]
            held.moved_from, held.position = held.position, end
            held.incarnation, held.moved_at = self.cursor.incarnation, now
