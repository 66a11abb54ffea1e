"""What clients must see, in memory: so short that its correctness is evident.

Each event gets its place when its transaction begins to commit. A committed event waits until it is
sequenced, and is then in the log, in the order of those places. The log is never cut: pruned events
are marked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta

from pg_eventstream.channels import PERMISSION_CHANGES
from pg_eventstream.postgres.slots import SLOTS, follows, slot_of

#: A user, by the name that the library uses, and a channel.
Right = tuple[str, str]
DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)
#: How long consumers hold events.
HOLD = timedelta(hours=40)


@dataclass(eq=False)
class Event:
    channel: str
    data: str
    skipped: frozenset[str] = frozenset()
    revokes: Right | None = None
    place: int = 0
    position: int = 0
    eid: int = 0
    #: The position in the stream; below 0 until the database has assigned it.
    incarnation: int = -1
    age: timedelta = timedelta()
    pruned: bool = False


@dataclass(frozen=True)
class Grant:
    right: Right


@dataclass
class Transaction:
    """An open or prepared transaction."""

    done: list[Event | Grant] = field(default_factory=list)
    #: The length of ``done`` at each savepoint.
    savepoints: list[int] = field(default_factory=list)

    @property
    def events(self) -> list[Event]:
        return [step for step in self.done if isinstance(step, Event)]

    @property
    def rights(self) -> set[Right | None]:
        return {step.right if isinstance(step, Grant) else step.revokes for step in self.done}


#: What a consumer's handler has written: position, channel, eid, data, replayed.
Row = tuple[int, str, int, str, bool]


@dataclass
class Follower:
    """A consumer. All numbers are positions; dictionaries are by slot."""

    channels: tuple[str, ...]
    prefixes: tuple[str, ...]
    handled_to: dict[int, int]
    #: The log in which that position is. A restore replaces the log.
    log: dict[int, list[Event]]
    #: The last events that were pruned before they were handled.
    lost: dict[int, int] = field(default_factory=dict)
    replay_to: dict[int, int] = field(default_factory=dict)
    #: Events that were pruned, and that nothing tells it.
    untold: list[Event] = field(default_factory=list)

    def follows(self, event: Event) -> bool:
        return is_reliable(event.channel) and follows(event.channel, self.channels, self.prefixes)

    def copy(self) -> Follower:
        return Follower(
            self.channels,
            self.prefixes,
            dict(self.handled_to),
            dict(self.log),
            dict(self.lost),
            dict(self.replay_to),
            list(self.untold),
        )


@dataclass(frozen=True)
class Saved:
    """A backup."""

    #: Events with what can change in them: age, pruned.
    log: list[tuple[Event, timedelta, bool]]
    waiting: list[Event]
    followers: dict[str, Follower]
    handled: dict[str, list[Row]]


class Model:
    def __init__(self) -> None:
        self.followers: dict[str, Follower] = {}
        #: What the handlers of consumers have written, by name, in their order.
        self.handled: dict[str, list[Row]] = {}
        self.log: list[Event] = []
        self.waiting: list[Event] = []
        self.rights: set[Right] = set()
        self.revocations: dict[Right, Event] = {}
        self._places = itertools.count(1)

    # What happens to the model

    def begin_commit(self, transaction: Transaction) -> None:
        """COMMIT or PREPARE TRANSACTION begins. Events are in the order of these calls."""
        for event in transaction.events:
            event.place = next(self._places)

    def commit(self, transaction: Transaction) -> None:
        """The transaction becomes visible to others."""
        for step in transaction.done:
            if isinstance(step, Grant):
                self.rights.add(step.right)
                continue
            self.waiting.append(step)
            if step.revokes is not None:
                self.rights.discard(step.revokes)
                self.revocations[step.revokes] = step

    def sequence(self) -> int:
        fresh = sorted(self.waiting, key=lambda event: event.place)
        for event in fresh:
            event.eid = self.tip(event.channel) + 1
            self.log.append(event)
            event.position = len(self.log)
        self.waiting.clear()
        return len(fresh)

    def pass_time(self, time: timedelta) -> None:
        for event in self.log:
            event.age += time

    def sweep(self, acknowledged: int) -> int:
        """Prune what is due: old and with a proxy, or unreliable and a minute old.

        What is old and not handled by all consumers is held for a while.
        """
        handled = [self.valid(f, slot) for f in self.followers.values() for slot in f.handled_to]
        handled_by_all = min(handled, default=len(self.log))
        due = [
            event
            for event in self.log
            if not event.pruned
            and (
                (
                    event.age > DAY
                    and event.position <= acknowledged
                    and (event.position <= handled_by_all or event.age > HOLD)
                )
                or (event.age > MINUTE and is_unreliable(event.channel))
            )
        ]
        for event in due:
            event.pruned = True
            for follower in self.followers.values():
                if self.lacks(follower, event):
                    slot = slot_of(event.channel)
                    follower.lost[slot] = max(event.position, follower.lost.get(slot, 0))
        return len(due)

    def follow(
        self, channels: tuple[str, ...], prefixes: tuple[str, ...], *, earliest: bool
    ) -> Follower:
        """A consumer runs for the first time."""
        begin = self.earliest() if earliest else len(self.log)
        slots = range(SLOTS)
        return Follower(
            channels, prefixes, dict.fromkeys(slots, begin), dict.fromkeys(slots, self.log)
        )

    def reset(self, name: str, *, earliest: bool) -> None:
        """The consumer is to handle all that is kept, or only what comes."""
        follower = self.followers[name]
        begin = self.earliest() if earliest else len(self.log)
        for slot in follower.handled_to:
            reached = max(
                self.valid(follower, slot),
                min(follower.replay_to.pop(slot, 0), self.common(follower, slot)),
            )
            if reached > begin:
                follower.replay_to[slot] = reached
            follower.handled_to[slot] = begin
            follower.log[slot] = self.log
        follower.lost.clear()
        follower.untold.clear()
        self.handled.pop(name, None)

    def handle(self, name: str, slot: int, position: int) -> None:
        """A slot's checkpoint has moved."""
        follower = self.followers[name]
        passed = self.log[follower.handled_to[slot] : position]
        for event in passed:
            if not follower.follows(event) or slot_of(event.channel) != slot:
                continue
            if event.pruned:
                assert event in follower.untold, "it was skipped"
                continue
            replayed = event.position <= follower.replay_to.get(slot, 0)
            row = event.position, event.channel, event.eid, event.data, replayed
            self.handled.setdefault(name, []).append(row)
        if passed:
            follower.log[slot] = self.log
        follower.handled_to[slot] = position

    # Backups

    def save(self) -> Saved:
        return Saved(
            [(event, event.age, event.pruned) for event in self.log],
            [replace(event) for event in self.waiting],
            {name: follower.copy() for name, follower in self.followers.items()},
            {name: list(rows) for name, rows in self.handled.items()},
        )

    def restore(self, saved: Saved, *, stream: bool, consumers: bool, handled: bool) -> None:
        """Set back the stream, the consumers, or both; and what handlers have written."""
        if stream:
            # Another list, though its events are the same.
            self.log = []
            for event, age, pruned in saved.log:
                event.age, event.pruned = age, pruned
                self.log.append(event)
            self.waiting = [replace(event) for event in saved.waiting]
        if consumers:
            self.followers = {name: one.copy() for name, one in saved.followers.items()}
        for follower in self.followers.values():
            for slot, last in follower.replay_to.items():
                # What comes after that was never handled.
                follower.replay_to[slot] = min(last, self.common(follower, slot))
        if consumers and not stream:
            for follower in self.followers.values():
                follower.untold += [e for e in self.log if e.pruned and self.lacks(follower, e)]
        if handled:
            self.handled = {name: list(rows) for name, rows in saved.handled.items()}

    def common(self, follower: Follower, slot: int) -> int:
        """The position up to which this log equals the one that a slot's events were in."""
        known = follower.log[slot]
        if known is self.log:
            return len(known)
        pairs = zip(known, self.log, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], pairs))

    def valid(self, follower: Follower, slot: int) -> int:
        """The position up to which a slot has handled the events of this log."""
        return min(follower.handled_to[slot], self.common(follower, slot))

    def is_ahead(self, follower: Follower) -> bool:
        """Whether a slot has handled events that are not in this log."""
        return any(
            self.valid(follower, s) < position for s, position in follower.handled_to.items()
        )

    def lacks(self, follower: Follower, event: Event) -> bool:
        """Whether a consumer has still to handle the event."""
        return follower.follows(event) and event.position > self.valid(
            follower, slot_of(event.channel)
        )

    def earliest(self) -> int:
        """The position before the first event that is kept."""
        return min((e.position - 1 for e in self.log if not e.pruned), default=len(self.log))

    def unhandled(self, follower: Follower) -> list[Event]:
        """What the consumer has still to handle, and can."""
        return [event for event in self.log if not event.pruned and self.lacks(follower, event)]

    # What follows from it

    def tip(self, channel: str) -> int:
        """The eid of the newest event."""
        return sum(event.channel == channel for event in self.log)

    def numbers(self, eids: dict[str, int]) -> dict[str, int]:
        """The numbers that ids show for these eids; for the next event, the number to expect."""
        incarnations = {(event.channel, event.eid): event.incarnation for event in self.log}
        return {
            channel: eid + incarnations.get((channel, min(eid, self.tip(channel))), 0)
            for channel, eid in eids.items()
        }

    def pruned(self, channel: str) -> int:
        """The eid of the newest pruned event."""
        return max((e.eid for e in self.log if e.channel == channel and e.pruned), default=0)

    def after(self, channels: Iterable[str], eids: dict[str, int], user: str) -> list[Event]:
        """All events after these eids that the user must get, in order."""
        return [
            event
            for event in self.log
            if event.channel in channels
            and event.eid > eids[event.channel]
            and user not in event.skipped
        ]

    def may_read(self, user: str, channel: str) -> bool:
        return channel.startswith("public") or (user, channel) in self.rights

    def may_get(self, user: str, event: Event) -> bool:
        """Whether the event can reach a stream of the user that was opened while it was allowed."""
        if self.may_read(user, event.channel):
            return True
        revocation = self.revocations.get((user, event.channel))
        # A revocation that is not sequenced comes after all sequenced events.
        return revocation is not None and (
            revocation.position == 0 or event.position < revocation.position
        )


def is_unreliable(channel: str) -> bool:
    return channel.startswith("volatile")


def is_reliable(channel: str) -> bool:
    return not is_unreliable(channel) and channel != PERMISSION_CHANGES
