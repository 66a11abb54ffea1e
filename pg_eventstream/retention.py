"""Prune what is past the retention, in small batches, never on a sender's path."""

from __future__ import annotations

import threading
from typing import Any

import psycopg

from .conf import conf
from .permission import CHANGES, is_reliable

_BATCH_EVENTS = 1000
_SCAN_EVENTS = 10_000

# One statement, so that no reader sees the event without its place in the stream or the
# other way round; and the channel remembers how far it is pruned in the same one.
_PRUNE = """
    WITH old AS MATERIALIZED ({old}),
    remembered AS (
        INSERT INTO pg_eventstream_channel AS known (name, pruned)
        SELECT channel, max(eid) FROM old GROUP BY channel
        ON CONFLICT (name) DO UPDATE
           SET pruned = greatest(known.pruned, excluded.pruned)
    ),
    unsaid AS (
        DELETE FROM pg_eventstream_event
         WHERE id = ANY(ARRAY(SELECT event_id FROM old))
    )
    DELETE FROM pg_eventstream_stream
     WHERE position = ANY(ARRAY(SELECT position FROM old))
"""


class Sweep:
    """Prunes all that is due with each `run_once`, until ``stopping`` is set.

    An event is due when it was sequenced longer ago than ``EVENTSTREAM_RETENTION`` and at
    least one of the configured proxies has acknowledged it; without proxies, the age decides
    alone. What is not sequenced yet stays, however old. An unreliable event is due after a
    minute: by then every proxy and every process has passed it on, or will not.

    ``connection`` is in autocommit mode.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], stopping: threading.Event | None = None
    ) -> None:
        self._connection = connection
        self._stopping = stopping or threading.Event()
        # How far the unreliable events are pruned: nothing below is looked at again.
        self._scanned = -(2**63)

    def run_once(self) -> int:
        """Returns how many events were pruned. Raises `psycopg.Error`."""
        pruned = 0
        while not self._stopping.is_set() and self._prune_outbox():
            pass
        while not self._stopping.is_set() and (batch := self._prune_old()):
            pruned += batch
        while not self._stopping.is_set() and (page := self._prune_unreliable()) is not None:
            pruned += page
        return pruned

    def _prune_old(self) -> int:
        """Up to 1,000 events past the retention, oldest first."""
        return self._prune(
            """
            SELECT position, channel, eid, event_id
              FROM (SELECT * FROM pg_eventstream_stream
                     WHERE position <= CASE WHEN %(proxied)s
                           THEN (SELECT coalesce(max(position), 0) FROM pg_eventstream_proxy)
                           ELSE 9223372036854775807 END
                     ORDER BY position LIMIT %(batch)s) AS oldest
             WHERE sequenced_at < statement_timestamp() - %(retention)s
            """,
            {
                "proxied": bool(conf.grip_proxies),
                "batch": _BATCH_EVENTS,
                "retention": conf.retention,
            },
        )

    def _prune_unreliable(self) -> int | None:
        """Those among the next 10,000 events; None if there are none to look at.

        Only the channel manager knows which they are, so each event is looked at once.
        """
        row = self._connection.execute(
            """
            SELECT max(position), array_agg(DISTINCT channel)
              FROM (SELECT position, channel,
                           bool_and(sequenced_at < statement_timestamp() - interval '1 minute')
                           OVER (ORDER BY position) AS old
                      FROM (SELECT * FROM pg_eventstream_stream WHERE position > %s
                             ORDER BY position LIMIT %s) AS following) AS page
             WHERE old
            """,
            [self._scanned, _SCAN_EVENTS],
        ).fetchone()
        if row is None or row[0] is None:
            return None
        last, channels = row
        # Changes of permission are kept: whoever is late ends its streams then.
        unreliable = [c for c in channels if c != CHANGES and not is_reliable(c)]
        pruned = 0
        if unreliable:
            pruned = self._prune(
                """
                SELECT position, channel, eid, event_id FROM pg_eventstream_stream
                 WHERE position > %(scanned)s AND position <= %(last)s
                   AND channel = ANY(%(unreliable)s)
                """,
                {"scanned": self._scanned, "last": last, "unreliable": unreliable},
            )
        self._scanned = last
        return pruned

    def _prune(self, old: str, params: dict[str, Any]) -> int:
        # The lock keeps two sweeps apart; it conflicts with no reader and no sender.
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.execute("LOCK TABLE pg_eventstream_channel IN SHARE ROW EXCLUSIVE MODE")
            cursor.execute(_PRUNE.format(old=old), params)
            return cursor.rowcount

    def _prune_outbox(self) -> int:
        """Up to 1,000 outbox rows that are sequenced for certain.

        Those are the rows of all transactions that were over when the cursor's snapshot was
        taken. They are not kept for the retention: nothing reads them again.
        """
        with self._connection.cursor() as cursor:
            cursor.execute(
                """
                DELETE FROM pg_eventstream_outbox
                 WHERE (xid, seq) IN (
                       SELECT xid, seq FROM pg_eventstream_outbox
                        WHERE xid < (SELECT pg_snapshot_xmin(snapshot) FROM pg_eventstream_cursor
                                      WHERE cluster = (SELECT system_identifier
                                                         FROM pg_control_system()))
                        ORDER BY xid, seq LIMIT %s)
                """,
                [_BATCH_EVENTS],
            )
            return cursor.rowcount
