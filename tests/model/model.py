"""What clients must see, in memory: so short that its correctness is evident.

Each event gets its place when its transaction begins to commit. A committed event waits until it is
sequenced, and is then in the log, in the order of those places. The log is never cut: pruned events
are marked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
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


@dataclass
class Follower:
    """A consumer. All numbers are positions; those of dictionaries are by slot."""

    channels: tuple[str, ...]
    prefixes: tuple[str, ...]
    begin: int
    handled_to: dict[int, int]
    #: The last events that were pruned before they were handled.
    lost: dict[int, int] = field(default_factory=dict)
    replay_to: dict[int, int] = field(default_factory=dict)

    def follows(self, event: Event) -> bool:
        return is_reliable(event.channel) and follows(event.channel, self.channels, self.prefixes)

    def lacks(self, event: Event) -> bool:
        """Whether it has still to handle the event."""
        return self.follows(event) and event.position > self.handled_to[slot_of(event.channel)]


class Model:
    def __init__(self) -> None:
        self.followers: dict[str, Follower] = {}
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
        handled = [position for f in self.followers.values() for position in f.handled_to.values()]
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
                if follower.lacks(event):
                    slot = slot_of(event.channel)
                    follower.lost[slot] = max(event.position, follower.lost.get(slot, 0))
        return len(due)

    def follow(
        self, channels: tuple[str, ...], prefixes: tuple[str, ...], *, earliest: bool
    ) -> Follower:
        """A consumer runs for the first time."""
        begin = self.earliest() if earliest else len(self.log)
        return Follower(channels, prefixes, begin, dict.fromkeys(range(SLOTS), begin))

    def reset(self, follower: Follower) -> None:
        """The consumer is to handle all that is kept."""
        begin = self.earliest()
        for slot, position in follower.handled_to.items():
            reached = max(position, follower.replay_to.get(slot, 0))
            follower.replay_to[slot] = reached
            follower.handled_to[slot] = begin
        follower.begin = begin
        follower.lost.clear()

    def earliest(self) -> int:
        """The position before the first event that is kept."""
        return min((e.position - 1 for e in self.log if not e.pruned), default=len(self.log))

    def unhandled(self, follower: Follower) -> list[Event]:
        """What the consumer has still to handle, and can."""
        return [event for event in self.log if not event.pruned and follower.lacks(event)]

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
