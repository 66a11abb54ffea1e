"""How far consumers are, and what keeps them: for the status, the commands and the admin.

It costs little on a large database, however far a consumer is behind: see `LAGS`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg

from ..channels import is_reliable
from ..postgres import monitor
from ..postgres.locks import CONSUMER_LOCKS, MEMBER, owner_of
from ..postgres.report import consumer_report
from ..postgres.sequence import CURSOR, WAITING
from ..postgres.slots import CHECKPOINTS, SLOTS, follows, follows_sql, slot_of, slot_sql
from .declaration import Declaration
from .event import event_id

Connection = psycopg.Connection[Any]

#: Parked events are counted up to this number, and events that are not in order yet.
MOST_COUNTED = 10_000
#: Events are counted exactly up to this many positions after a checkpoint. Of the positions above
#: these, so many are looked at, and the number is estimated.
EXACT_POSITIONS, SAMPLED_POSITIONS = 2000, 500

_LEAST = -(2**63)


@dataclass(frozen=True, slots=True, kw_only=True)
class TroubledSlot:
    """A slot that waits before it tries an event again, or that has stopped."""

    slot: int
    #: The id of the event. None if it has stopped for another reason, or the event is pruned.
    event: str | None
    attempts: int
    error: str
    #: The time until the next attempt; 0 if that is due. None if it has stopped.
    retry_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """An event on which a handler has worked for a long time."""

    event: str
    holder: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that has slots of a consumer: ``host:pid/…``, or empty while it begins."""

    name: str
    slots: list[int]
    #: The time since its last sign of life, which it shows every 10 seconds.
    heartbeat_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerState:
    """How far a consumer is. A consumer that is not registered has never run."""

    name: str
    registered: bool = True
    #: Whether the code of this process declares it. None if that could not be imported.
    declared: bool | None = None
    declared_at: str | None = None
    #: The name that it has now, if the code declares the one from before.
    renamed_to: str | None = None
    channels: list[str] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    #: Its ``timeout`` in the code of this process.
    timeout_seconds: float | None = None
    paused: bool = False

    #: The committed events that it has to handle and has not, in order or not. An estimate if
    #: there are many. None if that cannot be told.
    lag_events: int | None = None
    lag_is_estimate: bool = False
    #: The age of the oldest of these; 0 if there is none. None if that cannot be told.
    lag_seconds: float | None = None
    #: The same, without the slots that have stopped or wait before they try again.
    free_lag_seconds: float | None = None
    #: All its slots have handled, or passed, the events up to here.
    position: int | None = None
    #: The positions after that, of all channels.
    unread_positions: int | None = None

    #: The number of processes that run it, and those that have slots.
    processes: int = 0
    holders: list[Holder] = field(default_factory=list)
    unheld_slots: list[int] = field(default_factory=list)
    #: The longest time without a sign of life from a process that has slots. None if none has.
    heartbeat_seconds: float | None = None
    #: What a handler works on, if its process shows no sign of life.
    working: Working | None = None

    failing: list[TroubledSlot] = field(default_factory=list)
    stopped: list[TroubledSlot] = field(default_factory=list)
    #: Parked events, counted up to `MOST_COUNTED`.
    parked: int = 0
    #: The last position that was pruned before it was handled. None if there was none.
    lost: int | None = None
    #: Up to where it handles events again that it had handled before a reset. None if it does not.
    replay_to: int | None = None


#: What is stored about each slot of each consumer.
_SLOTS = f"""
    SELECT k.id, k.name, k.former_names, k.channels, k.prefixes, k.paused, s.slot, s.holder,
           extract(epoch FROM clock_timestamp() - s.heartbeat)::float8, s.failing,
           failing.channel, failing.number, s.attempts, s.error,
           greatest(0, extract(epoch FROM s.retry_at - clock_timestamp()))::float8, s.stopped,
           s.lost, s.replay_to, p.position, c.position
      FROM pg_eventstream_consumer AS k
     CROSS JOIN LATERAL {CHECKPOINTS.format(consumer_id="k.id")} AS p
      JOIN pg_eventstream_slot AS s ON s.consumer_id = k.id AND s.slot = p.slot
      LEFT JOIN {CURSOR} AS c ON true
      LEFT JOIN LATERAL (
           SELECT channel, eid + coalesce(incarnation, 0) AS number
             FROM pg_eventstream_stream WHERE position = s.failing OFFSET 0) AS failing ON true
"""  # noqa: S608

_PARKED = f"""
    SELECT k.id, (SELECT count(*) FROM (
                      SELECT FROM pg_eventstream_parked
                       WHERE consumer_id = k.id LIMIT {MOST_COUNTED}) AS counted)
      FROM pg_eventstream_consumer AS k
"""  # noqa: S608

_WORKING = """
    SELECT name, content, extract(epoch FROM clock_timestamp() - at)::float8
      FROM pg_eventstream_report WHERE name = ANY(%s)
"""

_WAITING_CHANNELS = f"""
    WITH {WAITING}
    SELECT channel, count(*), extract(epoch FROM clock_timestamp() - min(committed_at))::float8
      FROM waiting GROUP BY channel
"""  # noqa: S608

#: The events that are in order and not handled, by consumer, by whether their slot is held up (it
#: has stopped, or waits before it tries again), and by channel.
#:
#: A slot that is held up does not hide how far the others are, so the stream is read twice: from
#: the lowest checkpoint of each kind. Both times EXACT_POSITIONS rows are read at most. Above them,
#: SAMPLED_POSITIONS rows are looked up, one of each part of the rest, and stand for all of it. They
#: are not at equal distances, because channels can alternate.
#: Rows below what the pruner has reported are not read, because vacuum might not have removed them.
LAGS = f"""
    WITH c AS MATERIALIZED (SELECT * FROM {CURSOR} AS c),
    place AS MATERIALIZED (
        SELECT k.id, p.slot, s.stopped OR s.failing IS NOT NULL AS held_up,
               CASE WHEN p.incarnation <> c.incarnation
                    THEN least(p.position, c.began) ELSE p.position END AS position
          FROM pg_eventstream_consumer AS k
         CROSS JOIN LATERAL {CHECKPOINTS.format(consumer_id="k.id")} AS p
          JOIN pg_eventstream_slot AS s ON s.consumer_id = k.id AND s.slot = p.slot
          LEFT JOIN c ON true
    ),
    part AS MATERIALIZED (
        SELECT id, kind.held_up, min(position) FILTER (WHERE place.held_up = kind.held_up) AS low,
               array_agg(CASE WHEN place.held_up = kind.held_up THEN position END ORDER BY slot)
               AS places
          FROM place CROSS JOIN (VALUES (false), (true)) AS kind (held_up)
         GROUP BY id, kind.held_up
    ),
    near AS MATERIALIZED (
        SELECT part.id, part.held_up, s.*
          FROM part
         CROSS JOIN LATERAL (
               SELECT channel, position, coalesce(committed_at, sequenced_at) AS at
                 FROM pg_eventstream_stream
                WHERE position > greatest(part.low, %(pruned)s::bigint)
                ORDER BY position LIMIT %(exact)s) AS s
         WHERE part.low IS NOT NULL
    ),
    far AS (
        SELECT id, held_up, max(near.position) AS after,
               ((SELECT c.position FROM c) - max(near.position))::float8 / %(sampled)s AS step
          FROM near GROUP BY id, held_up HAVING count(*) = %(exact)s
    ),
    found AS (
        SELECT id, held_up, channel, position, at, 1.0::float8 AS weight, false AS sampled
          FROM near
        UNION ALL
        SELECT far.id, far.held_up, s.channel, s.position, s.at, far.step, true
          FROM far CROSS JOIN generate_series(1, %(sampled)s) AS nth
         CROSS JOIN LATERAL (
               SELECT channel, position, coalesce(committed_at, sequenced_at) AS at
                 FROM pg_eventstream_stream
                WHERE position = far.after + ceil(
                      (nth - 1 + mod(nth * nth * 0.618034, 1)) * far.step)::bigint
                OFFSET 0) AS s
         WHERE far.step > 0
    )
    SELECT id, held_up, channel, sum(weight),
           extract(epoch FROM clock_timestamp() - min(at))::float8, bool_or(sampled),
           bool_or(NOT sampled)
      FROM found
      JOIN part USING (id, held_up)
      JOIN pg_eventstream_consumer AS k USING (id)
     WHERE {follows_sql("channel", "k.channels", "k.prefixes")}
       AND position > places[{slot_sql("channel")} + 1]
     GROUP BY id, held_up, channel
    UNION ALL
    SELECT id, held_up, NULL, 0, NULL, true, false FROM far WHERE step > 0
"""  # noqa: S608

_LOCKS = f"SELECT lock FROM {CONSUMER_LOCKS} AS held"  # noqa: S608


class _Consumer(NamedTuple):
    """A row of the table of consumers."""

    id: int
    name: str
    former_names: list[str]
    channels: list[str]
    prefixes: list[str]
    paused: bool


class _Slot(NamedTuple):
    """What is stored about one slot."""

    slot: int
    holder: str
    heartbeat_seconds: float | None
    failing: int | None
    channel: str | None
    number: int | None
    attempts: int
    error: str
    retry_seconds: float | None
    stopped: bool
    lost: int | None
    replay_to: int | None
    position: int
    last: int | None

    @property
    def trouble(self) -> TroubledSlot:
        return TroubledSlot(
            slot=self.slot,
            event=(
                None
                if self.channel is None or self.number is None
                else event_id(self.channel, self.number)
            ),
            attempts=self.attempts,
            error=self.error,
            retry_seconds=None if self.stopped else self.retry_seconds or 0.0,
        )


@dataclass(slots=True)
class _Lag:
    """What is left of one consumer. Of the two ages, one is for the slots that are held up."""

    events: float = 0.0
    is_estimate: bool = False
    seconds: dict[bool, float | None] = field(default_factory=lambda: {False: 0.0, True: 0.0})

    def add(self, events: float, seconds: float | None, *, held_up: bool) -> None:
        self.events += events
        self.seconds[held_up] = max(self.seconds[held_up] or 0.0, seconds or 0.0)


def read_consumers(
    connection: Connection, declared: Mapping[str, Declaration] | None, *, pruned: int = _LEAST
) -> list[ConsumerState] | None:
    """How far all consumers are, by name: those with tables and those that are declared.

    ``declared`` is what `declare.discover` returns; None if the code cannot be imported.
    Up to ``pruned`` all events are pruned. Returns None if this role may not read the tables of
    the consumers, or if they are missing. ``connection`` must be in autocommit mode.
    """
    rows = monitor.fetch(connection, _SLOTS)
    if rows is None:
        return None
    slots: defaultdict[int, list[_Slot]] = defaultdict(list)
    consumers: dict[int, _Consumer] = {}
    for row in rows:
        consumers[row[0]] = _Consumer(*row[:6])
        slots[row[0]].append(_Slot(*row[6:]))
    states = [*_read_registered(connection, consumers, slots, declared, pruned)]
    known = {state.name for state in states}
    renamed = {old: one.name for one in consumers.values() for old in one.former_names}
    states += [
        ConsumerState(
            name=name,
            registered=False,
            declared=True,
            declared_at=consumer.place,
            renamed_to=renamed.get(name),
            channels=list(consumer.channels),
            prefixes=list(consumer.prefixes),
        )
        for name, consumer in (declared or {}).items()
        if name not in known
    ]
    return sorted(states, key=lambda state: state.name)


def _read_registered(
    connection: Connection,
    consumers: dict[int, _Consumer],
    slots: dict[int, list[_Slot]],
    declared: Mapping[str, Declaration] | None,
    pruned: int,
) -> Iterable[ConsumerState]:
    if not consumers:
        return
    held: defaultdict[int, set[int]] = defaultdict(set)
    processes: defaultdict[int, int] = defaultdict(int)
    for (lock,) in monitor.fetch(connection, _LOCKS) or []:
        consumer_id, slot = owner_of(lock)
        if slot == MEMBER:
            processes[consumer_id] += 1
        else:
            held[consumer_id].add(slot)
    parked = dict(monitor.fetch(connection, _PARKED) or [])
    working = _read_working(connection, consumers)
    lags = _read_lags(connection, consumers, slots, pruned)
    for one in consumers.values():
        its_slots = sorted(slots[one.id])
        code = (declared or {}).get(one.name)
        lag = None if lags is None else lags[one.id]
        holders = _holders(slot for slot in its_slots if slot.slot in held[one.id])
        beats = [h.heartbeat_seconds for h in holders if h.heartbeat_seconds is not None]
        works = working.get(one.id)
        last = its_slots[0].last
        position = min(s.position if last is None else min(s.position, last) for s in its_slots)
        lost = [s.lost for s in its_slots if s.lost is not None and s.lost > s.position]
        replays = [s.replay_to for s in its_slots if (s.replay_to or _LEAST) > s.position]
        yield ConsumerState(
            name=one.name,
            declared=None if declared is None else code is not None,
            declared_at=code.place if code else None,
            channels=one.channels,
            prefixes=one.prefixes,
            timeout_seconds=code.timeout if code else None,
            paused=one.paused,
            lag_events=None if lag is None else round(lag.events),
            lag_is_estimate=lag is not None and lag.is_estimate,
            lag_seconds=None if lag is None else _oldest(lag.seconds.values()),
            free_lag_seconds=None if lag is None else lag.seconds[False],
            position=position,
            unread_positions=max(0, (last or 0) - position),
            processes=processes[one.id],
            holders=holders,
            unheld_slots=sorted({*range(SLOTS)} - held[one.id]),
            heartbeat_seconds=max(beats, default=None),
            working=works if works and works.holder in {h.name for h in holders} else None,
            failing=[s.trouble for s in its_slots if s.failing is not None and not s.stopped],
            stopped=[s.trouble for s in its_slots if s.stopped],
            parked=parked.get(one.id, 0),
            lost=max(lost, default=None),
            replay_to=max((r for r in replays if r is not None), default=None),
        )


def _holders(slots: Iterable[_Slot]) -> list[Holder]:
    by_name: defaultdict[str, list[_Slot]] = defaultdict(list)
    for slot in slots:
        by_name[slot.holder].append(slot)
    return [
        Holder(
            name=name,
            slots=[slot.slot for slot in its],
            heartbeat_seconds=max(
                (max(0.0, s.heartbeat_seconds) for s in its if s.heartbeat_seconds is not None),
                default=None,
            ),
        )
        for name, its in sorted(by_name.items())
    ]


def _read_working(connection: Connection, consumers: Iterable[int]) -> dict[int, Working]:
    """What processes have said about handlers that have worked for long: see `worker`."""
    ids = {consumer_report(consumer_id): consumer_id for consumer_id in consumers}
    return {
        ids[name]: Working(
            event=str(content.get("event")),
            holder=str(content.get("holder")),
            seconds=max(0.0, age + float(content.get("seconds", 0))),
        )
        for name, content, age in monitor.fetch(connection, _WORKING, [[*ids]]) or []
    }


def _read_lags(
    connection: Connection,
    consumers: dict[int, _Consumer],
    slots: dict[int, list[_Slot]],
    pruned: int,
) -> dict[int, _Lag] | None:
    # First what waits: an event that gets its place in between is counted twice for a moment, and
    # not left out.
    waiting = monitor.fetch(connection, _WAITING_CHANNELS, {"most": MOST_COUNTED})
    rows = monitor.fetch(
        connection,
        LAGS,
        {"pruned": pruned, "exact": EXACT_POSITIONS, "sampled": SAMPLED_POSITIONS},
    )
    if waiting is None or rows is None:
        return None
    lags = {consumer_id: _Lag() for consumer_id in consumers}
    reliable: dict[str, bool] = {}

    def handles(channel: str) -> bool:
        if channel not in reliable:
            reliable[channel] = is_reliable(channel)
        return reliable[channel]

    exact: set[tuple[int, bool]] = set()
    for consumer_id, held_up, channel, events, seconds, is_sampled, is_exact in rows:
        lag = lags.get(consumer_id)
        if lag is None:  # it was registered in between
            continue
        lag.is_estimate |= is_sampled
        if channel is not None and handles(channel):
            lag.add(events, seconds, held_up=held_up)
            if is_exact:
                exact.add((consumer_id, held_up))
    is_cut = sum(count for _, count, _ in waiting) >= MOST_COUNTED
    for consumer_id, consumer in consumers.items():
        lags[consumer_id].is_estimate |= is_cut
        held_up_slots = {s.slot for s in slots[consumer_id] if s.stopped or s.failing is not None}
        for channel, count, seconds in waiting:
            if follows(channel, consumer.channels, consumer.prefixes) and handles(channel):
                is_held_up = slot_of(channel) in held_up_slots
                lags[consumer_id].add(count, seconds, held_up=is_held_up)
    for consumer_id, held_up, channel, *_ in rows:
        # What is not found near the checkpoint can begin anywhere between two samples.
        if channel is None and consumer_id in lags and (consumer_id, held_up) not in exact:
            lags[consumer_id].seconds[held_up] = None
    return lags


def _oldest(ages: Iterable[float | None]) -> float | None:
    known = [*ages]
    return None if None in known else max(age or 0.0 for age in known)
