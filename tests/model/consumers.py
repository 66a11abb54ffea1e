"""Consumers of the model test: what they handle is exactly what the model expects."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import pytest
from django.db import connections

from pg_eventstream.consumers import ConsumedEvent, Consumer, Retry, operations
from pg_eventstream.consumers.declare import _declared
from pg_eventstream.errors import CheckpointAhead, ConsumerMissedEvents
from pg_eventstream.postgres.slots import CHECKPOINTS, SLOTS, slot_of
from tests.model.model import Follower, Model, Row
from tests.model.world import World

#: Name, channels, prefixes, start, batch.
CONSUMERS = {
    "everything": ((), (), "earliest", 1),
    "room": (("room", "volatile"), (), "earliest", 3),
    "public": ((), ("public",), "latest", 2),
}


class Crash(BaseException):
    """The process that handles an event dies."""


class Consumers:
    def __init__(self, world: World, model: Model) -> None:
        self._world, self._model = world, model
        self._left = 0
        self.consumers = {
            name: Consumer(
                *(name, lambda event, name=name: self._handle(name, event), channels, prefixes),
                *(start, Retry(1000), "park", batch, None),  # type: ignore[arg-type]
            )
            for name, (channels, prefixes, start, batch) in CONSUMERS.items()
        }
        for name, own in self.consumers.items():
            own.before_reset(partial(self._forget, name))
        # As if its code declared them.
        _declared.update(self.consumers)

    def _forget(self, name: str) -> None:
        """What a consumer has made of the events is deleted."""
        with connections["default"].cursor() as cursor:
            cursor.execute("DELETE FROM handled_in_model WHERE consumer = %s", [name])

    def _handle(self, name: str, event: ConsumedEvent) -> None:
        with connections["default"].cursor() as cursor:
            cursor.execute(
                "INSERT INTO handled_in_model (consumer, position, channel, eid, data, replayed)"
                " VALUES (%s, %s, %s, %s, %s, %s)",
                [name, event.position, event.channel, event.eid, event.data, event.replayed],
            )
        self._left -= 1
        if self._left < 0:
            raise Crash

    def handle(self, name: str, crash_after: int | None = None) -> None:
        """Handle everything, or die before one more than so many events are handled."""
        own = self.consumers[name]
        follower = self._model.followers.get(name)
        if follower is None:
            earliest = own.start == "earliest"
            follower = self._model.follow(own.channels, own.prefixes, earliest=earliest)
            self._model.followers[name] = follower
        self._model.sequence()
        waiting = len(self._model.unhandled(follower))
        misses = self._model.is_ahead(follower) or any(
            lost > follower.handled_to[s] for s, lost in follower.lost.items()
        )
        self._left = 1_000_000 if crash_after is None else crash_after
        if misses:
            # Other slots are handled before that is noticed, or are not.
            with pytest.raises((CheckpointAhead, ConsumerMissedEvents, Crash)):
                own.drain()
        elif waiting > self._left:
            with pytest.raises(Crash):
                own.drain()
            self._world.connection.execute("UPDATE pg_eventstream_slot SET holder = 'dead:1/a'")
        else:
            assert own.drain() == waiting
        self._check(name, follower)
        if not misses and crash_after is None:
            assert self._model.unhandled(follower) == []

    def reset(self, name: str, *, earliest: bool = True) -> None:
        """Handle everything again that is kept, or only what comes."""
        follower = self._model.followers.get(name)
        if follower is None:
            return
        self._model.reset(name, earliest=earliest)
        operations.reset("default", name, "earliest" if earliest else "latest")
        self._check(name, follower)

    def _check(self, name: str, follower: Follower) -> None:
        """All that was handled is what the model expects up to the checkpoints, in order."""
        rows = self._world.connection.execute(
            f"""
            SELECT slot, c.position, coalesce(s.lost, 0)
              FROM pg_eventstream_consumer AS k
             CROSS JOIN LATERAL {CHECKPOINTS.format(consumer_id="k.id")} AS c
              JOIN pg_eventstream_slot AS s USING (consumer_id, slot) WHERE name = %s
            """,
            [name],
        ).fetchall()
        assert len(rows) == SLOTS
        assert {slot: lost for slot, _, lost in rows if lost} == follower.lost
        for slot, position, _ in rows:
            if self._model.valid(follower, slot) < follower.handled_to[slot]:
                assert position == follower.handled_to[slot]  # it has stopped
            else:
                assert follower.handled_to[slot] <= position <= len(self._model.log)
                self._model.handle(name, slot, position)
        handled = self._world.connection.execute(
            "SELECT position, channel, eid, data, replayed FROM handled_in_model"
            " WHERE consumer = %s ORDER BY nth",
            [name],
        ).fetchall()
        assert by_slot(handled) == by_slot(self._model.handled.get(name, []))


def by_slot(rows: list[Row]) -> dict[int, list[Row]]:
    slots: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        slots[slot_of(row[1])].append(row)
    return slots
