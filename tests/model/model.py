"""What clients must see, in memory: so little that one can see that it is right.

Each event gets its place when its transaction begins to commit. What is committed waits until it
is sequenced; then it stands in the log, in the order of those places. The log is never cut: what
the sweep prunes is marked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

from pg_eventstream.channels import PERMISSION_CHANGES

#: A user, as the library names them, and a channel.
Right = tuple[str, str]
DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)


@dataclass(eq=False)
class Event:
    channel: str
    data: str
    skipped: frozenset[str] = frozenset()
    revokes: Right | None = None
    place: int = 0
    position: int = 0
    eid: int = 0
    #: Of the stream; below 0 until the database says which.
    incarnation: int = -1
    age: timedelta = timedelta()
    pruned: bool = False


@dataclass(frozen=True)
class Grant:
    right: Right


@dataclass
class Transaction:
    """One that is open, or prepared."""

    done: list[Event | Grant] = field(default_factory=list)
    #: How much was done at each.
    savepoints: list[int] = field(default_factory=list)

    @property
    def events(self) -> list[Event]:
        return [step for step in self.done if isinstance(step, Event)]

    @property
    def rights(self) -> set[Right | None]:
        return {step.right if isinstance(step, Grant) else step.revokes for step in self.done}


class Model:
    def __init__(self) -> None:
        self.log: list[Event] = []
        self.waiting: list[Event] = []
        self.rights: set[Right] = set()
        self.revocations: dict[Right, Event] = {}
        self._places = itertools.count(1)

    # What is done to it

    def begin_commit(self, transaction: Transaction) -> None:
        """COMMIT, or PREPARE TRANSACTION, begins: the order of these is the order of events."""
        for event in transaction.events:
            event.place = next(self._places)

    def commit(self, transaction: Transaction) -> None:
        """It is visible to others from now on."""
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
        """Prune what is due: old and with a proxy, or unreliable and a minute old."""
        due = [
            event
            for event in self.log
            if not event.pruned
            and (
                (event.age > DAY and event.position <= acknowledged)
                or (event.age > MINUTE and is_unreliable(event.channel))
            )
        ]
        for event in due:
            event.pruned = True
        return len(due)

    # What follows from it

    def tip(self, channel: str) -> int:
        """The eid of the newest event."""
        return sum(event.channel == channel for event in self.log)

    def numbers(self, eids: dict[str, int]) -> dict[str, int]:
        """What ids show of these events; of one that is to come, what the last one lets expect."""
        incarnations = {(event.channel, event.eid): event.incarnation for event in self.log}
        return {
            channel: eid + incarnations.get((channel, min(eid, self.tip(channel))), 0)
            for channel, eid in eids.items()
        }

    def pruned(self, channel: str) -> int:
        """The eid of the newest event that is pruned."""
        return max((e.eid for e in self.log if e.channel == channel and e.pruned), default=0)

    def after(self, channels: Iterable[str], eids: dict[str, int], user: str) -> list[Event]:
        """All that the user must get behind these eids, in order."""
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
        """Whether the event may reach a stream of the user, opened when that was allowed."""
        if self.may_read(user, event.channel):
            return True
        revocation = self.revocations.get((user, event.channel))
        # A revocation that is not sequenced comes after all that is.
        return revocation is not None and (
            revocation.position == 0 or event.position < revocation.position
        )


def is_unreliable(channel: str) -> bool:
    return channel.startswith("volatile")


def is_reliable(channel: str) -> bool:
    return not is_unreliable(channel) and channel != PERMISSION_CHANGES
