"""Runs consumers in a test, in its own transaction: for `testing.captured_events`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from typing import NamedTuple

from django.db import transaction

from ..errors import EventStreamError
from ..events import get_current_event_id
from ..sse import parse_id
from .checkpoints import Connection
from .declaration import Declaration
from .handling import check_transaction, raw_connection
from .reader import make_event

#: How many times the events that handlers have sent are handled, before that is an error.
_MOST_ROUNDS = 100

# An event that has no place in the order yet gets one after those that have.
_SENT = """
    SELECT e.id, e.channel, e.type, e.data, e.meta::text, e.created,
           s.position, s.eid + coalesce(s.incarnation, 0), s.committed_at,
           coalesce((SELECT max(position) FROM pg_eventstream_cursor), 0)
           + row_number() OVER (PARTITION BY s.position IS NULL ORDER BY e.id),
           row_number() OVER (PARTITION BY s.position IS NULL, e.channel ORDER BY e.id)
      FROM pg_eventstream_event AS e
      LEFT JOIN pg_eventstream_stream AS s ON s.event_id = e.id
     WHERE e.id > %(after)s OR s.position IS NULL
     ORDER BY e.id
"""


class _Sent(NamedTuple):
    event: int
    channel: str
    type: str
    data: str
    meta: str | None
    created: datetime
    position: int | None
    number: int | None
    committed_at: datetime | None
    new_position: int
    nth: int


class Delivery:
    """Handles the events whose rows have an id after ``after`` once with each consumer."""

    def __init__(self, alias: str, consumers: Iterable[Declaration], after: int) -> None:
        self.consumers = list(consumers)
        self._alias = alias
        self._after = after
        self._handled: set[tuple[int, str]] = set()

    def run(self) -> None:
        """Handle what was sent, in order, and what handlers send, until there is nothing left.

        Raises what a handler raises, whose work is rolled back.
        """
        for _ in range(_MOST_ROUNDS):
            calls = [
                (consumer, sent)
                for sent in self._sent(raw_connection(self._alias))
                for consumer in self.consumers
                if (sent.event, consumer.name) not in self._handled
                and consumer.follows(sent.channel)
            ]
            if not calls:
                return
            for consumer, sent in calls:
                self._handle(consumer, sent)
        consumer, sent = calls[-1]
        raise EventStreamError(
            f"The consumers' handlers send events without end: after {_MOST_ROUNDS} rounds there"
            f" are still new ones. The last was {sent.type!r} in the channel {sent.channel!r}, for"
            f" {consumer.name!r}. Let that consumer follow other channels than it sends to, or let"
            " its handler stop at some point."
        )

    def _sent(self, connection: Connection) -> list[_Sent]:
        rows = map(_Sent._make, connection.execute(_SENT, {"after": self._after}).fetchall())
        return [row for row in rows if row.event > self._after]

    def _handle(self, consumer: Declaration, sent: _Sent) -> None:
        key = sent.event, consumer.name
        if key in self._handled:  # by `wait` in another handler
            return
        self._handled.add(key)
        number = sent.number
        if number is None:
            newest = parse_id(get_current_event_id([sent.channel])).get(sent.channel, 0)
            number = newest + sent.nth
        event = make_event(
            sent.channel,
            number,
            sent.type,
            sent.data,
            sent.meta,
            sent.new_position if sent.position is None else sent.position,
            sent.created,
            sent.committed_at or datetime.now(timezone.utc),
            replayed=False,
            attempt=1,
        )
        try:
            with transaction.atomic(using=self._alias):
                connection = raw_connection(self._alias)
                connection.execute("SELECT")  # so that the transaction has begun
                consumer.handler(event)
                check_transaction(self._alias, connection)
        except BaseException:
            self._handled.discard(key)
            raise
