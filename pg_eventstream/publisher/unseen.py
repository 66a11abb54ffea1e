"""Prunes events that the trigger did not see, which have no place in the order and never get one.

The trigger does not fire in a session with ``session_replication_role = replica`` (restores,
replication), or while it is disabled. Such an event is in neither the outbox nor the stream. In any
snapshot, every other event is in one of the two from its COMMIT until it is pruned.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any

import psycopg

from ..conf import conf
from ..postgres.connector import fetch_one

logger = logging.getLogger(__name__)

# The numbers of events to read first, to look up in a part of the stream, and in all of it.
_PEEK_EVENTS, _PAGE_EVENTS, _MOST_EVENTS = 100, 10_000, 100_000
_PART_EVENTS = 2 * _PAGE_EVENTS

# No table is indexed by event, so the tables are read once, with any statistics.
_SET_UP = """
    SET LOCAL enable_nestloop = off;
    SET LOCAL enable_mergejoin = off;
    SET LOCAL jit = off;
    SET LOCAL synchronous_commit = off
"""
# Events are in the stream nearly in the order of their keys, so most are found in the part after
# those that were found last. The position is null for events that are not found.
_NEAR = """
    WITH near AS MATERIALIZED (
        SELECT position, event_id FROM pg_eventstream_stream
         WHERE position > %(near)s ORDER BY position LIMIT %(part)s
    )
    SELECT id, position FROM unnest(%(ids)s::bigint[]) AS id LEFT JOIN near ON event_id = id
"""
_DELETE = """
    WITH old AS MATERIALIZED (SELECT unnest(%s::bigint[]) AS id)
    DELETE FROM pg_eventstream_event WHERE id = ANY(ARRAY(
        SELECT id FROM old
        EXCEPT SELECT event_id FROM old JOIN pg_eventstream_stream ON event_id = id
        EXCEPT SELECT event_id FROM old JOIN pg_eventstream_outbox ON event_id = id))
"""


class UnseenEvents:
    """Prunes unseen events that were created longer ago than ``EVENTSTREAM_RETENTION``.

    After other events were pruned, hardly any are that old, so it reads only the oldest few, by
    their key. Only if one of them is old, events are looked up in the stream, each only once, even
    if they are kept for long because no proxy acknowledges them.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self.forget()

    def forget(self) -> None:
        """Begin again with the first event, because others could have appeared before it."""
        self._first = self._near = -(2**63)
        self._not_found: list[int] = []

    def prune(self, now: datetime) -> int | None:
        """Prune one page of old events. Returns their number, or None if no event is left."""
        retention = conf.retention
        if retention is None:
            return None
        params = {"first": self._first, "now": now, "retention": retention}
        old, first = self._look(_PEEK_EVENTS, params)
        if old:
            old, _ = self._look(_PAGE_EVENTS, params)
            self._find(old)
            self._first = old[-1] + 1
            if len(self._not_found) < _MOST_EVENTS:
                return 0
        elif first is not None:
            self._first = first
        if not self._not_found:
            return None
        old, self._not_found = self._not_found, []
        return self._delete(old)

    def _look(self, limit: int, params: dict[str, Any]) -> tuple[list[int], int | None]:
        """The old ones of the first ``limit`` events, and the first of all."""
        old, first = fetch_one(
            self._connection,
            """
            SELECT coalesce(array_agg(id ORDER BY id) FILTER (WHERE old), '{}'), min(id)
              FROM (SELECT id, created < %(now)s - %(retention)s AS old
                      FROM pg_eventstream_event
                     WHERE id >= %(first)s ORDER BY id LIMIT %(limit)s) AS oldest
            """,
            {**params, "limit": limit},
        )
        return old, first

    def _find(self, ids: list[int]) -> None:
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.execute(_SET_UP)
            rows = cursor.execute(
                _NEAR, {"ids": ids, "near": self._near, "part": _PART_EVENTS}
            ).fetchall()
        self._not_found += [event_id for event_id, position in rows if position is None]
        positions = [position for _, position in rows if position is not None]
        if positions:
            self._near = max(positions) - _PAGE_EVENTS

    def _delete(self, ids: list[int]) -> int:
        """Delete those of the events that are in neither table. Returns their number."""
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.execute(_SET_UP)
            pruned = cursor.execute(_DELETE, [ids]).rowcount
        if pruned:
            logger.warning(
                "%d events have been pruned that were never delivered, because the trigger on"
                " pg_eventstream_event did not see them. Run manage.py check --database %s",
                pruned,
                conf.database,
                extra={"event": "events-not-seen", "count": pruned},
            )
        return pruned
