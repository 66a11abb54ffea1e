"""Prunes events past the retention, in small batches, and never in a sender's transaction."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import psycopg

from ..channels import DOCTOR, PERMISSION_CHANGES, reliable
from ..conf import conf
from ..limits import Limits
from ..postgres.connector import Connector, explain, fetch_one, plain_sql
from ..postgres.locks import LOCK_SPACE, PRUNE_LOCK
from ..postgres.report import PRUNER, write_report
from ..postgres.sequence import CURSOR, UNKNOWN, Cursor
from ..postgres.slots import HANDLED, HANDLED_BY_ALL, follows_sql, slot_sql
from ..postgres.threads import return_connections
from ..rarely import Rarely
from .unseen import UnseenEvents

logger = logging.getLogger(__name__)

_BATCH_EVENTS = 1000
_SCAN_EVENTS = 10_000

# How long the pruner trusts its place. No row is known to appear before that place; one that does
# in spite of this is pruned an hour later.
_FORGET_SECONDS = 3600.0

# A channel records at least once per this many events how far it is pruned.
_REMEMBER_EVENTS = 1000

# With statistics from before a burst, or from before pruning, the planner would read and sort all
# rows for each batch. Before PostgreSQL 18, a node that is switched off here but is unavoidable
# adds 1e10 to the cost, for which JIT would compile a batch for longer than it runs. No batch waits
# for the disk, because rows that a crash restores are pruned again.
#
# A statement after the lock must see what was committed while this waited for it: through a pooler,
# the session can have another default.
_SET_UP = """
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
    SET LOCAL enable_seqscan = off;
    SET LOCAL enable_bitmapscan = off;
    SET LOCAL enable_sort = off;
    SET LOCAL jit = off;
    SET LOCAL synchronous_commit = off
"""

# One statement, so that no reader sees an event without its place in the stream, or a place without
# its event. Of the rows looked at, the old ones are deleted. Returns their number, and the position
# up to which no row is left.
#
# A channel records how far it is pruned only if its rows do not tell: if no row is left above, or
# one is left below. It also does so regularly, so that a search for its oldest row does not read
# many dead rows that are not vacuumed. Recording it with each batch would cost more than all the
# rest.
#
# It also tells whether an event is kept because a consumer has not handled it, and whether such an
# event is older than the consumers may hold it.
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
    deleted_events AS (
        DELETE FROM pg_eventstream_event
         WHERE id = ANY(ARRAY(SELECT event_id FROM old))
    ),
    deleted_places AS (
        DELETE FROM pg_eventstream_stream
         WHERE position = ANY(ARRAY(SELECT position FROM old))
    ){lost}
    SELECT count(*) FILTER (WHERE old),
           coalesce(min(position) FILTER (WHERE NOT old) - 1, max(position)),
           {tell}
      FROM looked_at
"""

# The events past the retention. All consumers have handled those that are not held.
_DUE = """
    SELECT position, channel, eid, event_id, incarnation, due AND NOT held AS old,
           due AND held AS held, due AND held AND sequenced_at < %(now)s - %(hold)s AS overdue
      FROM (SELECT *, sequenced_at < %(now)s - %(retention)s AS due,
                   coalesce(position > ({handled}), false) AS held
              FROM (SELECT position, channel, eid, event_id, sequenced_at,
                           coalesce(incarnation, 0) AS incarnation
                      FROM pg_eventstream_stream
                     WHERE position > %(empty_to)s
                       AND position <= CASE WHEN %(proxied)s
                           THEN (SELECT coalesce(max(position), 0) FROM pg_eventstream_proxy)
                           ELSE 9223372036854775807 END
                     ORDER BY position LIMIT %(batch)s) AS oldest) AS aged
"""
# For a role that may not see how far consumers are: it holds all events if there is a consumer. A
# consumer that is registered has its row before the lock is released.
_MAY_BE_UNHANDLED = f"""
    SELECT CASE WHEN pg_relation_size(to_regclass('pg_eventstream_consumer')) > 0
                THEN {-(2**63)} END
"""
_MAY_SEE_CONSUMERS = """
    SELECT bool_and(has_column_privilege(to_regclass('pg_eventstream_' || name), col, privilege))
      FROM (VALUES ('consumer', 'channels', 'SELECT'), ('checkpoint', 'position', 'SELECT'),
                   ('slot', 'lost', 'SELECT'), ('slot', 'lost', 'UPDATE')
           ) AS needed (name, col, privilege)
"""

# Events that are pruned although consumers have not handled them. Each slot that should have
# handled some gets the position of the last of them. So the consumer knows what is missing as soon
# as it is missing. This waits for no handler that has locked the slot: it would keep others from
# registering.
_OVERDUE = f"""
    SELECT position, channel, eid, event_id, incarnation,
           overdue AND channel = ANY(%(seen)s::text[]) AS old
      FROM ({_DUE.format(handled=HANDLED_BY_ALL)}) AS due
"""  # noqa: S608
_LOST = f""",
    gone AS (
        SELECT channel, {slot_sql("channel")} AS slot, max(position) AS position
          FROM old WHERE channel = ANY(%(reliable)s::text[]) GROUP BY channel
    ),
    missed AS (
        SELECT consumer_id, name, slot, max(gone.position) AS position
          FROM {HANDLED} AS handled JOIN gone USING (slot)
         WHERE gone.position > handled.position
           AND {follows_sql("gone.channel", "handled.channels", "handled.prefixes")}
         GROUP BY consumer_id, name, slot
    ),
    locked AS MATERIALIZED (
        SELECT s.consumer_id, s.slot, missed.position
          FROM missed JOIN pg_eventstream_slot AS s USING (consumer_id, slot)
           FOR UPDATE OF s NOWAIT
    ),
    told AS (
        UPDATE pg_eventstream_slot AS s SET lost = greatest(s.lost, locked.position)
          FROM locked WHERE (s.consumer_id, s.slot) = (locked.consumer_id, locked.slot)
    )"""  # noqa: S608

# What a batch also tells.
_NOTHING = "NULL"
_HELD = "coalesce(bool_or(held), false), coalesce(bool_or(overdue), false)"
_MISSED_BY = "(SELECT array_agg(DISTINCT name ORDER BY name) FROM missed)"

_is_unseen_due = Rarely(3600.0)


class Pruner:
    """Prunes all events that are due with each `run_once`, until ``stopping`` is set.

    An event is due if it was sequenced longer ago than ``EVENTSTREAM_RETENTION`` and at least one
    of the configured proxies has acknowledged it; without proxies, only its age counts. An event
    that is not sequenced yet is kept at any age. An event that a consumer has not handled is kept
    until it was sequenced longer ago than ``EVENTSTREAM_CONSUMER_HOLD`` as well; when it is pruned
    then, the consumer is told in the same statement. For an event that the trigger did not see, the
    time of its creation counts instead. If the retention is None, none of these is ever due. An
    unreliable event, or a probe of the doctor, is due after a minute: by then every proxy and every
    process has delivered it, or never will.

    It continues where it stopped instead of searching the oldest row from the lower end of an
    index: while a session holds an old snapshot, vacuum cannot remove rows, and each batch would
    read all rows that were pruned since then.

    ``connection`` must be in autocommit mode.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], stopping: threading.Event | None = None
    ) -> None:
        self._connection = connection
        self._stopping = stopping or threading.Event()
        # The position up to which unreliable events are pruned; rows below are not read again.
        self._scanned: int | None = None
        self._unseen = UnseenEvents(connection)
        self._cursor = UNKNOWN
        self._may_see_consumers = True
        self._forget()

    def _forget(self) -> None:
        # No row of the stream is left up to this position, and none can be added: positions are
        # assigned under a lock that is held until COMMIT, so they appear in order.
        self._empty_to = -(2**63)
        # No row of the outbox is left up to this key: see _prune_outbox.
        self._outbox_empty_to = ("0", -(2**63))
        self._unseen.forget()
        self._forget_at = time.monotonic() + _FORGET_SECONDS

    @classmethod
    def run(
        cls,
        connector: Connector,
        stopping: threading.Event,
        last_event_at: Callable[[], float],
    ) -> None:
        """Prune regularly until ``stopping`` is set. Errors of the database do not end it.

        It prunes every 30 seconds, or every 10 minutes if there are no events and nothing was
        pruned. ``last_event_at`` returns when events were last sequenced, by `time.monotonic`.
        """
        while not stopping.is_set():
            try:
                with connector.connect("prune") as connection:
                    pruner = cls(connection, stopping)
                    pruned_at = 0.0
                    while not stopping.is_set():
                        if pruner.run_once():
                            pruned_at = time.monotonic()
                        _wait(stopping, last_event_at, pruned_at, connector.limits)
            except psycopg.Error as e:
                logger.warning(
                    "pruner: database: %s; trying again",
                    explain(e),
                    extra={"event": "database-lost", "part": "pruner"},
                )
            except Exception:
                logger.exception(
                    "pruner: unexpected error; trying again",
                    extra={"event": "unexpected-error", "part": "pruner"},
                )
            stopping.wait(connector.limits.prune)

    def run_once(self) -> int:
        """Prune once. Returns the number of pruned events. Raises `psycopg.Error`."""
        if time.monotonic() >= self._forget_at:
            self._forget()
        # Events that become due in the meantime are left to the next run, or this would not end.
        row = fetch_one(
            self._connection,
            f"""
            SELECT statement_timestamp(), ({_MAY_SEE_CONSUMERS}), c.*
              FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true
            """,  # noqa: S608
        )
        now: datetime = row[0]
        self._may_see_consumers = bool(row[1])
        known, self._cursor = self._cursor, Cursor.of(*row[2:])
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
        return_connections()  # a connection that the channel manager may have used
        write_report(self._connection, PRUNER, {"position": self._empty_to, "pruned": pruned})
        return pruned

    def _prune_old(self, now: datetime) -> int:
        """Prune up to 1,000 events past the retention, oldest first. Returns their number."""
        retention = conf.retention
        if retention is None:
            return 0
        params = {
            "empty_to": self._empty_to,
            "proxied": bool(conf.grip_proxies),
            "batch": _BATCH_EVENTS,
            "now": now,
            "retention": retention,
            "hold": conf.consumer_hold,
        }
        handled = HANDLED_BY_ALL if self._may_see_consumers else _MAY_BE_UNHANDLED
        with self._pruning() as cursor:
            pruned, empty_to, held, overdue = _prune(
                cursor, _DUE.format(handled=handled), params, tell=_HELD
            )
        if empty_to is not None:
            self._empty_to = empty_to
        batch = int(pruned)
        if held and not self._may_see_consumers:
            self._say_what_to_grant()
        elif overdue and not batch:
            batch = self._prune_overdue(params)
        return batch

    def _prune_overdue(self, params: dict[str, Any]) -> int:
        """Prune events that consumers have held for too long, and tell these consumers.

        Not all at once with the others, because only the channel manager knows which of them are
        unreliable, so that no consumer lacks them.
        """
        try:
            with self._pruning() as cursor:
                due = _DUE.format(handled=HANDLED_BY_ALL)
                rows = cursor.execute(
                    f"SELECT DISTINCT channel FROM ({due}) AS due WHERE overdue",  # noqa: S608
                    params,
                ).fetchall()
                seen = [channel for (channel,) in rows]
                pruned, empty_to, names = _prune(
                    cursor,
                    _OVERDUE,
                    {**params, "seen": seen, "reliable": reliable(seen)},
                    lost=_LOST,
                    tell=_MISSED_BY,
                )
        except psycopg.errors.LockNotAvailable:
            return 0  # a handler works; the next run tries again
        if empty_to is not None:
            self._empty_to = empty_to
        if names:
            logger.error(
                "pruner: events are pruned that were kept for EVENTSTREAM_CONSUMER_HOLD, and that"
                " these consumers have not handled: %s. They stop, and say what to do",
                ", ".join(names),
                extra={"event": "consumers-missed-events", "consumers": names},
            )
        return int(pruned)

    def _say_what_to_grant(self) -> None:
        if not _is_unseen_due():
            return
        (role,) = fetch_one(self._connection, "SELECT current_user")
        logger.error(
            "pruner: events past the retention are kept, because the role %s may not see which of"
            " them consumers have handled. As the owner of the tables, run:"
            " psql -v publisher=%s -f %s/grants.sql DATABASE",
            role,
            role,
            plain_sql(),
            extra={"event": "may-not-see-consumers", "role": role},
        )

    def _prune_unreliable_channels(self, now: datetime) -> int:
        """Prune unreliable events that an earlier pruner has left, by their channels.

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
            if unreliable := _unreliable(channels):
                while not self._stopping.is_set():
                    batch = self._prune(
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
        """Up to 1,000 channels of the stream after ``name``, by one index lookup each."""
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
        """Prune the unreliable ones of the next 10,000 events. Returns None if no event is left.

        Only the channel manager knows which events are unreliable, so each event is read once.
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
        unreliable = _unreliable(channels)
        pruned = 0
        if unreliable:
            pruned = self._prune(
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

    def _prune(self, looked_at: str, params: dict[str, Any]) -> int:
        """Prune events that no consumer handles."""
        with self._pruning() as cursor:
            return int(_prune(cursor, looked_at, params)[0])

    @contextmanager
    def _pruning(self) -> Iterator[psycopg.Cursor[Any]]:
        # The lock prevents two pruners from running at once, and a consumer from being registered
        # or set back to events that are just being pruned. It affects no other session.
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.execute(_SET_UP)
            cursor.execute(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {PRUNE_LOCK})")
            yield cursor

    def _prune_outbox(self) -> int:
        """Prune up to 1,000 outbox rows that are certainly sequenced. Returns their number.

        These are the rows of all transactions that had ended when the cursor's snapshot was taken.
        They are not kept for the retention, because they are not read again.

        All of them are visible now and none can be added, so deleting them in the order of the key
        leaves none behind, even though later transactions can have lower ids than some rows in the
        outbox.
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


def _prune(
    cursor: psycopg.Cursor[Any],
    looked_at: str,
    params: dict[str, Any],
    *,
    lost: str = "",
    tell: str = _NOTHING,
) -> tuple[Any, ...]:
    """Prune one batch. Returns their number, the position up to which none is left, and more."""
    statement = _PRUNE.format(looked_at=looked_at, every=_REMEMBER_EVENTS, lost=lost, tell=tell)
    row: tuple[Any, ...] | None = cursor.execute(statement, params).fetchone()
    assert row is not None  # noqa: S101
    return row


def _unreliable(channels: list[str]) -> list[str]:
    """The channels whose events are not kept."""
    # Permission changes are kept, so that late proxies and processes end their streams as well. The
    # doctor's probes have ids, but nobody needs them after the doctor has ended.
    kept = {PERMISSION_CHANGES, *reliable(channels)} - {DOCTOR}
    return [channel for channel in channels if channel not in kept]


def _wait(
    stopping: threading.Event,
    last_event_at: Callable[[], float],
    pruned_at: float,
    limits: Limits,
) -> None:
    """Wait until events could be due."""
    began = time.monotonic()
    while not stopping.wait(limits.prune):
        now = time.monotonic()
        # Events that other processes sequence count as quiet, and are pruned a little later.
        quiet_prune = limits.quiet_prune
        if (retention := conf.retention) is not None:
            quiet_prune = min(quiet_prune, retention.total_seconds() / 10)
        if now < max(last_event_at(), pruned_at) + limits.quiet or now >= began + quiet_prune:
            return
