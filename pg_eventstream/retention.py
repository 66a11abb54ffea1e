"""Prune what is past the retention, in small batches, never on a sender's path."""

from __future__ import annotations

import threading
from typing import Any

import psycopg

from .conf import conf

_BATCH_EVENTS = 1000


def prune(connection: psycopg.Connection[Any], stopping: threading.Event | None = None) -> int:
    """Prune all that is due, batch by batch, until ``stopping`` is set. Returns the events.

    ``connection`` is in autocommit mode. Raises `psycopg.Error`.
    """
    pruned = 0
    while not (stopping and stopping.is_set()) and _outbox_batch(connection):
        pass
    while not (stopping and stopping.is_set()) and (batch := _batch(connection)):
        pruned += batch
    return pruned


def _batch(connection: psycopg.Connection[Any]) -> int:
    """Prune up to 1,000 events, oldest first. Returns how many; 0 when there are none left.

    An event goes when it was sequenced longer ago than ``EVENTSTREAM_RETENTION`` and at
    least one of the configured proxies has acknowledged it; without proxies, the age
    decides alone. What is not sequenced yet stays, however old.
    """
    # One statement, so that no reader sees the event without its place in the stream or
    # the other way round; and the channel remembers how far it is pruned in the same one.
    # The lock keeps two sweeps apart; it conflicts with no reader and no sender.
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute("LOCK TABLE pg_eventstream_channel IN SHARE ROW EXCLUSIVE MODE")
        cursor.execute(
            """
            WITH old AS MATERIALIZED (
                SELECT position, channel, eid, event_id
                  FROM (SELECT * FROM pg_eventstream_stream
                         WHERE position <= CASE WHEN %(proxied)s
                               THEN (SELECT coalesce(max(position), 0) FROM pg_eventstream_proxy)
                               ELSE 9223372036854775807 END
                         ORDER BY position LIMIT %(batch)s) AS oldest
                 WHERE sequenced_at < statement_timestamp() - %(retention)s
            ),
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
            """,
            {
                "proxied": bool(conf.grip_proxies),
                "batch": _BATCH_EVENTS,
                "retention": conf.retention,
            },
        )
        return cursor.rowcount


def _outbox_batch(connection: psycopg.Connection[Any]) -> int:
    """Delete up to 1,000 outbox rows that are sequenced for certain. Returns how many.

    Those are the rows of all transactions that were over when the cursor's snapshot was
    taken. They are not kept for the retention: nothing reads them again.
    """
    with connection.cursor() as cursor:
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
