"""What there is to know about consumers: for the command and the admin.

All functions take a psycopg connection. Nothing here costs much on a large stream: the events that
a consumer has not handled are looked at up to `LOOKED_AT`, and otherwise only subtracted.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, TypeVar

from .. import sse
from ..channels import is_reliable
from ..errors import EventStreamError, UnknownConsumer
from ..postgres.connector import fetch_one
from ..postgres.locks import MEMBER, consumer_lock, owner_of
from ..postgres.sequence import CURSOR, Cursor
from ..postgres.slots import CHECKPOINTS, SLOTS, follows_sql, slot_sql
from .checkpoints import Connection
from .declare import Consumer, discover
from .event import event_id

LOOKED_AT = 10_000


class Named(Protocol):
    """An event that a person can name by its id or its position."""

    @property
    def id(self) -> str: ...
    @property
    def channel(self) -> str: ...
    @property
    def position(self) -> int: ...


_Named = TypeVar("_Named", bound=Named)


@dataclass(frozen=True, slots=True)
class Parked:
    """A parked event. ``id`` is what `operations.retry` takes."""

    pk: int
    id: str
    channel: str
    type: str
    position: int
    slot: int
    attempts: int
    parked_at: datetime
    #: Whether it is to be tried again, and no process has done so yet.
    retry: bool
    error: str
    traceback: str
    data: str


@dataclass(frozen=True, slots=True)
class Failing:
    """A slot that fails or has stopped. ``id`` is what `operations.skip` takes."""

    slot: int
    #: The id of the event, or its position if it is not stored any more. Empty if no event is to
    #: blame: the error says what is wrong.
    id: str
    channel: str
    position: int
    attempts: int
    error: str
    #: The seconds until the next attempt. None if it has stopped.
    retry_seconds: float | None
    stopped: bool


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that handles events of a consumer."""

    name: str
    slots: list[int]
    #: The time since it last said that it is at work.
    heartbeat_seconds: float | None


@dataclass(frozen=True, slots=True)
class Overview:
    """A consumer that is declared in the code, has stored rows, or both."""

    name: str
    #: Where the code declares it. None if it does not: the consumer is orphaned.
    declared_at: str | None
    has_run: bool
    #: Its present name, if it was renamed, and the code has the old name.
    renamed_to: str | None = None
    former_names: list[str] = field(default_factory=list)
    channels: list[str] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    paused: bool = False
    #: All events up to here are handled, in all slots.
    position: int | None = None
    #: The events of its channels that are in order and not handled; a maximum unless
    #: ``lag_is_exact``.
    lag_events: int = 0
    lag_is_exact: bool = True
    #: The age of the oldest of them; a maximum unless ``lag_is_exact``.
    lag_seconds: float | None = None
    holders: list[Holder] = field(default_factory=list)
    #: The slots that no process holds now.
    free_slots: list[int] = field(default_factory=list)
    failing: list[Failing] = field(default_factory=list)
    parked: int = 0
    #: While it handles again what had been handled before a reset: up to where, and how many
    #: positions are left.
    replay_to: int | None = None
    replay_left: int = 0

    @property
    def is_orphaned(self) -> bool:
        return self.declared_at is None


def find_consumer(connection: Connection, name: str) -> int:
    """The id of a consumer. Raises `UnknownConsumer`."""
    row = connection.execute(
        "SELECT id FROM pg_eventstream_consumer WHERE name = %s", [name]
    ).fetchone()
    if row is None:
        raise unknown_consumer(connection, name)
    return int(row[0])


def unknown_consumer(connection: Connection, name: str) -> UnknownConsumer:
    """An error that says which consumers there are."""
    rows = connection.execute(
        "SELECT name, %s = ANY(former_names) FROM pg_eventstream_consumer ORDER BY name", [name]
    ).fetchall()
    if renamed := [other for other, had_name in rows if had_name]:
        return UnknownConsumer(f"The consumer {name!r} was renamed to {renamed[0]!r}.")
    if name in discover():
        return UnknownConsumer(
            f"The consumer {name!r} has never run, so nothing is stored about it. Start it:"
            f" manage.py eventstream_consumers run {name}"
        )
    names = [other for other, _ in rows]
    close = difflib.get_close_matches(name, names, 1)
    return UnknownConsumer(
        f"There is no consumer {name!r}."
        + (f" Did you mean {close[0]!r}?" if close else "")
        + f" There are: {', '.join(map(repr, names)) or 'none'}."
    )


def match(events: Sequence[_Named], text: str) -> _Named | None:
    """The event with this id or position."""
    if text.isascii() and text.removeprefix("-").isdigit():
        return next((event for event in events if event.position == int(text)), None)
    try:
        # A digest in an id stands for a long name.
        numbers = sse.parse_id(text, {event.channel for event in events})
    except EventStreamError:
        return None
    wanted = sse.make_id(numbers)
    return next((event for event in events if event.id == wanted), None)


# Reading


def list_parked(connection: Connection, consumer_id: int) -> list[Parked]:
    """The parked events, in their order."""
    rows = connection.execute(
        """
        SELECT id, channel, number, type, position, slot, attempts, parked_at, retry, error,
               traceback, data
          FROM pg_eventstream_parked WHERE consumer_id = %s ORDER BY position
        """,
        [consumer_id],
    ).fetchall()
    return [
        Parked(pk, event_id(channel, number), channel, *rest) for pk, channel, number, *rest in rows
    ]


_FAILING = """
    SELECT slot, s.channel, s.eid + coalesce(s.incarnation, 0), failing, attempts, error,
           greatest(extract(epoch FROM retry_at - clock_timestamp()), 0)::float8, stopped
      FROM pg_eventstream_slot LEFT JOIN pg_eventstream_stream AS s ON s.position = failing
     WHERE consumer_id = %s AND (failing IS NOT NULL OR stopped)
     ORDER BY slot
"""


def list_failing(connection: Connection, consumer_id: int) -> list[Failing]:
    """The slots that fail or have stopped."""
    found = []
    for row in connection.execute(_FAILING, [consumer_id]).fetchall():
        slot, channel, number, position, *rest = row
        name = "" if position is None else str(position)
        if channel is not None:
            name = event_id(channel, number)
        found.append(Failing(slot, name, channel or "", position or 0, *rest))
    return found


_LOCKS = f"""
    SELECT objid::bigint
      FROM pg_locks
     WHERE locktype = 'advisory' AND granted
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
       AND classid = 'pg_eventstream_event'::regclass AND objid >= {consumer_lock(0, 0)}
       AND objsubid = 2
"""  # noqa: S608


def held_slots(connection: Connection) -> dict[int, set[int]]:
    """The slots that processes hold now, by the ids of their consumers."""
    held: defaultdict[int, set[int]] = defaultdict(set)
    for (lock,) in connection.execute(_LOCKS).fetchall():
        consumer_id, slot = owner_of(lock)
        if slot != MEMBER:
            held[consumer_id].add(slot)
    return held


_CONSUMERS = """
    SELECT k.id, k.name, k.former_names, k.channels, k.prefixes, k.paused,
           (SELECT count(*) FROM pg_eventstream_parked WHERE consumer_id = k.id)
      FROM pg_eventstream_consumer AS k ORDER BY k.name
"""
_SLOTS = f"""
    SELECT k.id, c.slot, c.position, c.incarnation, s.holder,
           extract(epoch FROM clock_timestamp() - s.heartbeat)::float8, s.replay_to
      FROM pg_eventstream_consumer AS k
     CROSS JOIN LATERAL {CHECKPOINTS.format(consumer_id="k.id")} AS c
      JOIN pg_eventstream_slot AS s ON s.consumer_id = k.id AND s.slot = c.slot
     ORDER BY k.id, c.slot
"""  # noqa: S608
#: The events after a position, by channel, that their slots have not handled.
_AHEAD = f"""
    WITH page AS MATERIALIZED (
        SELECT position, channel, coalesce(committed_at, sequenced_at) AS at
          FROM pg_eventstream_stream WHERE position > %(after)s
         ORDER BY position LIMIT {LOOKED_AT}
    )
    SELECT page.channel, count(*),
           extract(epoch FROM clock_timestamp() - min(page.at))::float8
      FROM page
      JOIN unnest(%(slots)s::int[], %(positions)s::bigint[]) AS c (slot, position)
        ON c.slot = {slot_sql("page.channel")} AND page.position > c.position
     WHERE {follows_sql("page.channel", "%(channels)s::text[]", "%(prefixes)s::text[]")}
     GROUP BY page.channel
"""  # noqa: S608
#: The age of the last event that `_AHEAD` looks at, if there are more.
_END_OF_PAGE = f"""
    SELECT extract(epoch FROM clock_timestamp() - coalesce(committed_at, sequenced_at))::float8
      FROM pg_eventstream_stream WHERE position > %s
     ORDER BY position OFFSET {LOOKED_AT} LIMIT 1
"""  # noqa: S608


def list_consumers(connection: Connection, declared: Mapping[str, Consumer]) -> list[Overview]:
    """All consumers by name: those that have run, and those that are declared."""
    cursor = Cursor.of(
        *fetch_one(
            connection,
            f"SELECT c.* FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true",  # noqa: S608
        )
    )
    held = held_slots(connection)
    slots: defaultdict[int, list[_Slot]] = defaultdict(list)
    for consumer_id, *values in connection.execute(_SLOTS).fetchall():
        slots[consumer_id].append(_Slot(*values))
    found: dict[str, Overview] = {}
    renamed: dict[str, str] = {}
    for row in connection.execute(_CONSUMERS).fetchall():
        consumer_id, name, former_names, channels, prefixes, paused, parked = row
        its_slots = slots[consumer_id]
        positions = {s.slot: cursor.valid(s.position, s.incarnation) for s in its_slots}
        lag = _lag(connection, positions, cursor.position, channels, prefixes)
        replays = [s for s in its_slots if s.replay_to is not None and s.replay_to > s.position]
        renamed |= dict.fromkeys(former_names, name)
        found[name] = Overview(
            name=name,
            declared_at=declared[name].place if name in declared else None,
            has_run=True,
            former_names=former_names,
            channels=channels,
            prefixes=prefixes,
            paused=paused,
            position=min(positions.values(), default=None),
            lag_events=lag.events,
            lag_is_exact=lag.is_exact,
            lag_seconds=lag.seconds,
            holders=_holders(its_slots, held[consumer_id]),
            free_slots=sorted({*range(SLOTS)} - held[consumer_id]),
            failing=list_failing(connection, consumer_id),
            parked=parked,
            replay_to=max((s.replay_to or 0 for s in replays), default=None),
            replay_left=max(((s.replay_to or 0) - s.position for s in replays), default=0),
        )
    for name, consumer in declared.items():
        if name not in found:
            found[name] = Overview(
                name=name,
                declared_at=consumer.place,
                has_run=False,
                renamed_to=renamed.get(name),
                channels=list(consumer.channels),
                prefixes=list(consumer.prefixes),
            )
    return sorted(found.values(), key=lambda one: one.name)


@dataclass(frozen=True, slots=True)
class _Slot:
    slot: int
    position: int
    incarnation: int
    holder: str
    heartbeat_seconds: float | None
    replay_to: int | None


def _holders(slots: Iterable[_Slot], held: set[int]) -> list[Holder]:
    """The processes that hold slots now. One that has just taken a slot might have no name yet."""
    by_name: defaultdict[str, list[_Slot]] = defaultdict(list)
    for slot in slots:
        if slot.slot in held:
            by_name[slot.holder].append(slot)
    return [
        Holder(
            name,
            [slot.slot for slot in its],
            max(
                (s.heartbeat_seconds for s in its if s.heartbeat_seconds is not None), default=None
            ),
        )
        for name, its in sorted(by_name.items())
    ]


@dataclass(frozen=True, slots=True)
class _Lag:
    events: int
    is_exact: bool
    seconds: float | None


def _lag(
    connection: Connection,
    positions: Mapping[int, int],
    last: int,
    channels: list[str],
    prefixes: list[str],
) -> _Lag:
    lowest = min(positions.values(), default=last)
    if lowest >= last:
        return _Lag(0, True, None)
    rows = connection.execute(
        _AHEAD,
        {
            "after": lowest,
            "slots": list(positions),
            "positions": list(positions.values()),
            "channels": channels,
            "prefixes": prefixes,
        },
    ).fetchall()
    ahead = [(count, seconds) for channel, count, seconds in rows if is_reliable(channel)]
    oldest = max((seconds for _, seconds in ahead), default=None)
    end = connection.execute(_END_OF_PAGE, [lowest]).fetchone()
    if end is None:
        return _Lag(sum(count for count, _ in ahead), True, oldest)
    return _Lag(last - lowest, False, end[0] if oldest is None else oldest)
