"""Prune what is past the retention, in small batches, never on a sender's path."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import psycopg

from ..channels import PERMISSION_CHANGES, is_reliable
from ..conf import conf
from ..limits import LIMITS, Limits
from ..postgres.connector import Connector, explain, fetch_one
from ..postgres.locks import LOCK_SPACE, PRUNE_LOCK
from ..postgres.sequence import CURSOR, UNKNOWN, Cursor
from ..postgres.threads import give_back
from .unseen import UnseenEvents

logger = logging.getLogger(__name__)

_BATCH_EVENTS = 1000
_SCAN_EVENTS = 10_000

# How long the sweep trusts what it knows of its place. No row appears behind it by any way that
# we know of; whatever else puts one there has it pruned an hour later.
_FORGET_SECONDS = 3600.0

# A channel remembers at least every so many events how far it is pruned.
_REMEMBER_EVENTS = 1000

# Statistics that know nothing of a burst yet, or of what is pruned already, make the planner
# read and sort all that there is, again for each batch. What is switched off here counts, before
# PostgreSQL 18, as a cost of 1e10 where nothing else will do, for which JIT would compile a batch
# for longer than it runs. And no batch is worth waiting for the disk: what a crash brings back is
# pruned once more.
_SET_UP = """
    SET LOCAL enable_seqscan = off;
    SET LOCAL enable_bitmapscan = off;
    SET LOCAL enable_sort = off;
    SET LOCAL jit = off;
    SET LOCAL synchronous_commit = off
"""

# One statement, so that no reader sees the event without its place in the stream or the
# other way round. Of the rows looked at, those that are old go. Returns how many, and up to
# where no row is left.
#
# A channel remembers how far it is pruned only where its rows do not tell: when none is left
# above, or one is left below. And every so often, so that nobody who looks for its oldest row
# walks over many that are gone and not vacuumed. To write it down with each batch would cost
# more than all the rest.
_PRUNE = """
    WITH looked_at AS MATERIALIZED ({looked_at}),
    old AS MATERIALIZED (SELECT * FROM looked_at WHERE old),
    remembered AS (
        INSERT INTO pg_eventstream_channel AS known (name, pruned, incarnation)
        SELECT channel, last, incarnation
          FROM (SELECT channel, min(eid) AS first, max(eid) AS last, count(*) AS events,
                       (array_agg(incarnation ORDER BY eid DESC))[1] AS incarnation
                  FROM old GROUP BY channel) AS gone
         WHERE (SELECT s.eid FROM pg_eventstream_stream AS s
                 WHERE s.channel = gone.channel AND s.eid = gone.last + 1) IS NULL
            OR (SELECT s.eid FROM pg_eventstream_stream AS s
                 WHERE s.channel = gone.channel AND s.eid = gone.first - 1) IS NOT NULL
            OR events <> last - first + 1
            OR last / {every} > (first - 1) / {every}
        ON CONFLICT (name) DO UPDATE
           SET pruned = excluded.pruned, incarnation = excluded.incarnation
         WHERE known.pruned < excluded.pruned
    ),
    unsaid AS (
        DELETE FROM pg_eventstream_event
         WHERE id = ANY(ARRAY(SELECT event_id FROM old))
    ),
    gone AS (
        DELETE FROM pg_eventstream_stream
         WHERE position = ANY(ARRAY(SELECT position FROM old))
    )
    SELECT count(*) FILTER (WHERE old),
           coalesce(min(position) FILTER (WHERE NOT old) - 1, max(position))
      FROM looked_at
"""


class Pruner:
    """Prunes all that is due with each `run_once`, until ``stopping`` is set.

    An event is due when it was sequenced longer ago than ``EVENTSTREAM_RETENTION`` and at
    least one of the configured proxies has acknowledged it; without proxies, the age decides
    alone. What is not sequenced yet stays, however old. An event that the trigger did not see is
    due as long after it was created as others after they were sequenced. If the retention is None,
    none of these is ever due. An unreliable event is due after a minute: by then every proxy and
    every process has passed it on, or will not.

    It goes on where it stopped, and does not look for the oldest row from the lower end of an
    index: while some session holds an old snapshot, vacuum can remove nothing, and all that
    was pruned since would be walked over again with each batch.

    ``connection`` is in autocommit mode.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], stopping: threading.Event | None = None
    ) -> None:
        self._connection = connection
        self._stopping = stopping or threading.Event()
        # How far the unreliable events are pruned: nothing below is looked at again.
        self._scanned: int | None = None
        self._unseen = UnseenEvents(connection)
        self._cursor = UNKNOWN
        self._forget()

    def _forget(self) -> None:
        # No row of the stream is left up to here. None comes later either: positions are given
        # under a lock that is held until they are committed, so they appear in their order.
        self._empty_to = -(2**63)
        # Nor of the outbox up to here: see _prune_outbox.
        self._outbox_empty_to = ("0", -(2**63))
        self._unseen.forget()
        self._forget_at = time.monotonic() + _FORGET_SECONDS

    @classmethod
    def run(
        cls,
        connector: Connector,
        stopping: threading.Event,
        last_event_at: Callable[[], float],
        limits: Limits = LIMITS,
    ) -> None:
        """Prune regularly, until ``stopping`` is set. Never ends because of the database.

        Every 30 seconds; every 10 minutes, when there are no events and nothing was pruned.
        ``last_event_at`` is when events were sequenced last, by `time.monotonic`.
        """
        while not stopping.is_set():
            try:
                with connector.connect("prune") as connection:
                    pruner = cls(connection, stopping)
                    pruned_at = 0.0
                    while not stopping.is_set():
                        if pruner.run_once():
                            pruned_at = time.monotonic()
                        _wait(stopping, last_event_at, pruned_at, limits)
            except psycopg.Error as e:
                logger.warning("pruner: database: %s; trying again", explain(e))
            except Exception:
                logger.exception("pruner: unexpected error; trying again")
            stopping.wait(limits.prune)

    def run_once(self) -> int:
        """Returns how many events were pruned. Raises `psycopg.Error`."""
        if time.monotonic() >= self._forget_at:
            self._forget()
        # What becomes due meanwhile is left to the next time: there would always be a little.
        row = fetch_one(
            self._connection,
            f"""
            SELECT statement_timestamp(), c.*
              FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true
            """,  # noqa: S608
        )
        now: datetime = row[0]
        known, self._cursor = self._cursor, Cursor.of(*row[1:])
        if not self._cursor.follows(known):
            self._forget()
            self._scanned = None
        pruned = 0
        while not self._stopping.is_set() and self._prune_outbox() == _BATCH_EVENTS:
            pass
        while not self._stopping.is_set() and (batch := self._prune_old(now)):
            pruned += batch
        if self._scanned is None:
            pruned += self._prune_unreliable_channels(now)
        while not self._stopping.is_set() and (page := self._prune_unreliable(now)) is not None:
            pruned += page
        while not self._stopping.is_set() and (page := self._unseen.prune(now)) is not None:
            pruned += page
        give_back()  # what the channel manager may have asked over
        return pruned

    def _prune_old(self, now: datetime) -> int:
        """Up to 1,000 events past the retention, oldest first; none if all are kept."""
        retention = conf.retention
        if retention is None:
            return 0
        pruned, empty_to = self._prune(
            """
            SELECT position, channel, eid, event_id, coalesce(incarnation, 0) AS incarnation,
                   sequenced_at < %(now)s - %(retention)s AS old
              FROM pg_eventstream_stream
             WHERE position > %(empty_to)s
               AND position <= CASE WHEN %(proxied)s
                   THEN (SELECT coalesce(max(position), 0) FROM pg_eventstream_proxy)
                   ELSE 9223372036854775807 END
             ORDER BY position LIMIT %(batch)s
            """,
            {
                "empty_to": self._empty_to,
                "proxied": bool(conf.grip_proxies),
                "batch": _BATCH_EVENTS,
                "now": now,
                "retention": retention,
            },
        )
        if empty_to is not None:
            self._empty_to = empty_to
        return pruned

    def _prune_unreliable_channels(self, now: datetime) -> int:
        """Those that a sweep before this one has left, found by their channels.

        There are far fewer channels than events, and the index leads from one to the next.
        """
        row = self._connection.execute(
            """
            SELECT position FROM pg_eventstream_stream
             WHERE sequenced_at < %s - interval '1 minute'
             ORDER BY position DESC LIMIT 1
            """,
            [now],
        ).fetchone()
        last = row[0] if row else self._empty_to
        pruned, name = 0, ""
        while not self._stopping.is_set():
            channels = self._channels_after(name)
            if not channels:
                self._scanned = last
                break
            name = channels[-1]
            if unreliable := [c for c in channels if _is_unreliable(c)]:
                while not self._stopping.is_set():
                    batch, _ = self._prune(
                        """
                        SELECT position, channel, eid, event_id,
                               coalesce(incarnation, 0) AS incarnation, true AS old
                          FROM pg_eventstream_stream
                         WHERE channel = ANY(%(unreliable)s) AND position <= %(last)s
                         LIMIT %(batch)s
                        """,
                        {"unreliable": unreliable, "last": last, "batch": _SCAN_EVENTS},
                    )
                    if not batch:
                        break
                    pruned += batch
        return pruned

    def _channels_after(self, name: str) -> list[str]:
        """Up to 1,000 channels of the stream, by name: one index lookup each."""
        rows = self._connection.execute(
            """
            WITH RECURSIVE next (channel) AS (
                (SELECT channel FROM pg_eventstream_stream
                  WHERE channel > %s ORDER BY channel, eid LIMIT 1)
                UNION ALL
                SELECT following.channel FROM next CROSS JOIN LATERAL (
                       SELECT s.channel FROM pg_eventstream_stream AS s
                        WHERE s.channel > next.channel ORDER BY s.channel, s.eid LIMIT 1
                       ) AS following
            )
            SELECT channel FROM next LIMIT %s
            """,
            [name, _BATCH_EVENTS],
        ).fetchall()
        return [row[0] for row in rows]

    def _prune_unreliable(self, now: datetime) -> int | None:
        """Those among the next 10,000 events; None if there are none to look at.

        Only the channel manager knows which they are, so each event is looked at once.
        """
        row = self._connection.execute(
            """
            SELECT max(position), array_agg(DISTINCT channel)
              FROM (SELECT position, channel,
                           bool_and(sequenced_at < %s - interval '1 minute')
                           OVER (ORDER BY position) AS old
                      FROM (SELECT * FROM pg_eventstream_stream WHERE position > %s
                             ORDER BY position LIMIT %s) AS following) AS page
             WHERE old
            """,
            [now, self._scanned, _SCAN_EVENTS],
        ).fetchone()
        if row is None or row[0] is None:
            return None
        last, channels = row
        unreliable = [c for c in channels if _is_unreliable(c)]
        pruned = 0
        if unreliable:
            pruned, _ = self._prune(
                """
                SELECT position, channel, eid, event_id,
                       coalesce(incarnation, 0) AS incarnation, true AS old
                  FROM pg_eventstream_stream
                 WHERE position > %(scanned)s AND position <= %(last)s
                   AND channel = ANY(%(unreliable)s)
                """,
                {"scanned": self._scanned, "last": last, "unreliable": unreliable},
            )
        self._scanned = last
        return pruned

    def _prune(self, looked_at: str, params: dict[str, Any]) -> tuple[int, int | None]:
        # Keeps two sweeps apart, and nobody else.
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.execute(_SET_UP)
            cursor.execute(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {PRUNE_LOCK})")
            row = cursor.execute(
                _PRUNE.format(looked_at=looked_at, every=_REMEMBER_EVENTS), params
            ).fetchone()
        assert row is not None  # noqa: S101
        return row[0], row[1]

    def _prune_outbox(self) -> int:
        """Up to 1,000 outbox rows that are sequenced for certain.

        Those are the rows of all transactions that were over when the cursor's snapshot was
        taken. They are not kept for the retention: nothing reads them again.

        All of them are visible by now, and none can be added, so what this deletes in the
        order of the key leaves nothing behind, though later transactions may have lower ids
        than some that are in the outbox already.
        """
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.execute(_SET_UP)
            row = cursor.execute(
                """
                WITH gone AS (
                    DELETE FROM pg_eventstream_outbox
                     WHERE ctid = ANY(ARRAY(
                           SELECT ctid FROM pg_eventstream_outbox
                            WHERE (xid, seq) > (%s::xid8, %s)
                              AND xid < (SELECT pg_snapshot_xmin(snapshot)
                                           FROM (SELECT * FROM pg_eventstream_cursor
                                                  ORDER BY position DESC LIMIT 1) AS cursor
                                          WHERE cluster = (SELECT system_identifier
                                                             FROM pg_control_system()))
                            ORDER BY xid, seq LIMIT %s))
                    RETURNING xid, seq
                )
                SELECT count(*) OVER (), xid::text, seq
                  FROM gone ORDER BY gone.xid DESC, seq DESC LIMIT 1
                """,
                [*self._outbox_empty_to, _BATCH_EVENTS],
            ).fetchone()
        if row is None:
            return 0
        self._outbox_empty_to = (row[1], row[2])
        return int(row[0])


def _is_unreliable(channel: str) -> bool:
    # Changes of permission are kept: whoever is late ends its streams then.
    return channel != PERMISSION_CHANGES and not is_reliable(channel)


def _wait(
    stopping: threading.Event,
    last_event_at: Callable[[], float],
    pruned_at: float,
    limits: Limits,
) -> None:
    """Until something may be due."""
    began = time.monotonic()
    while not stopping.wait(limits.prune):
        now = time.monotonic()
        # Events that others sequence count as quiet; those are pruned a little later.
        quiet_prune = limits.quiet_prune
        if (retention := conf.retention) is not None:
            quiet_prune = min(quiet_prune, retention.total_seconds() / 10)
        if now < max(last_event_at(), pruned_at) + limits.quiet or now >= began + quiet_prune:
            return
