"""When does the publisher look for events? When it rings, or often enough.

NOTIFY takes a database-wide lock until the commit is durable (PostgreSQL:
src/backend/commands/async.c, PreCommit_Notify), so commits that notify queue up behind
each other. Writers therefore ring only if nobody is awake, which they learn from an
advisory lock, the bell lock (see ``sql/0001_enqueue.sql``):

asleep  the bell lock is free: writers ring, and LISTEN wakes us. For a trickle of events.
awake   the bell lock is held or requested by us: writers stay silent, and we poll every
        few milliseconds. For a flood of events.
drowsy  on the way from awake to asleep: the lock is free again, but a transaction that
        saw it taken may commit yet. We poll slowly until all of those are over.

A ring says nothing but "look": the tables are the truth.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import select
import time
from collections import deque
from typing import Any

import psycopg

logger = logging.getLogger(__name__)

CHANNEL = "pg_eventstream"
#: The two advisory locks, of the key space (oid of pg_eventstream_event, n).
BELL_LOCK, LEADER_LOCK = 1, 2
LOCK_SPACE = "'pg_eventstream_event'::regclass::oid::int4"

AWAKE_POLL = 0.003
#: Rounds that found something, per second: above the first wake up, below the second doze.
BUSY, CALM = 50, 25
_DROWSY_POLL_LEAST, _DROWSY_POLL_MOST = 0.02, 0.25
#: Without a working LISTEN there is nothing but polling.
_DEAF_POLL = 0.1


class State(enum.Enum):
    ASLEEP = "asleep"
    DROWSY = "drowsy"
    AWAKE = "awake"


class Doorbell:
    """Waits until there may be something to sequence.

    ``listener`` is the connection that also sequences; ``locker`` holds the bell lock and
    nothing else, because it may have to wait for it. ``safety_poll`` is the longest sleep in
    seconds, None for no limit.
    """

    def __init__(
        self,
        listener: psycopg.Connection[Any],
        locker: psycopg.Connection[Any],
        safety_poll: float | None,
    ) -> None:
        self._listener = listener
        self._locker = locker
        self._safety_poll = safety_poll
        self._rings = 0
        self._busy_rounds: deque[float] = deque(maxlen=BUSY)
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._drowsy_since = 0.0
        self._doze_horizon: int | None = None
        self.deaf = False

        listener.add_notify_handler(self._on_notify)
        listener.execute(f"LISTEN {CHANNEL}")
        self._hear_oneself()
        # Another publisher may have died a moment ago, and writers that saw it awake may
        # not have committed yet; its connection may even linger and hold the bell lock.
        # So start awake, and do not sleep before the lock was ours once.
        self._held_once = False
        self._awake()

    def close(self) -> None:
        with contextlib.suppress(psycopg.Error):  # the connection may be what ended us
            self._release_bell()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def wake(self) -> None:
        """End a wait from another thread or a signal handler."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wakes already
            os.write(self._wake_writer, b"w")

    def wait(self, sequenced: int) -> None:
        """Wait for the next round, given how many events the last one found.

        Returns at once if it rang since. Raises `psycopg.OperationalError` if a connection
        is lost.
        """
        now = time.monotonic()
        if sequenced:
            self._busy_rounds.append(now)
        rate = self._rate(now)
        if self.state is State.AWAKE:
            if rate < CALM and self._bell_was_ours():
                self._doze(now)
            else:
                self._sleep(AWAKE_POLL if rate else _DROWSY_POLL_LEAST)
        elif rate >= BUSY:
            # Not to sleep now: writers fall silent with this, and the last of them that rang
            # may be the one that woke us for this round.
            self._awake()
        elif self.state is State.ASLEEP:
            self._sleep(_DEAF_POLL if self.deaf else self._safety_poll)
        elif self._all_over():
            # One more round before the sleep: for what the last of them committed.
            self._enter(State.ASLEEP)
        else:
            # A straggler waits a tenth longer than its commit took anyway.
            longer = (now - self._drowsy_since) / 10
            self._sleep(min(max(longer, _DROWSY_POLL_LEAST), _DROWSY_POLL_MOST))

    def _rate(self, now: float) -> int:
        """How many of the last rounds found something, within the last second."""
        while self._busy_rounds and self._busy_rounds[0] < now - 1:
            self._busy_rounds.popleft()
        return len(self._busy_rounds)

    # The states

    def _enter(self, state: State) -> None:
        self.state = state
        logger.debug("doorbell: %s", state.value)

    def _awake(self) -> None:
        self._enter(State.AWAKE)
        # Sent without waiting for the answer: to stand in the queue for the lock is enough
        # to make the writers' attempts fail (PostgreSQL: src/backend/storage/lmgr/lock.c,
        # LockAcquireExtended checks the waiters' mask too), and a transaction that rang and
        # is not over yet cannot hold us up.
        self._locker.pgconn.send_query(
            f"SELECT pg_advisory_lock({LOCK_SPACE}, {BELL_LOCK})".encode()
        )
        self._locker.pgconn.flush()

    def _bell_was_ours(self) -> bool:
        if not self._held_once:
            self._locker.pgconn.consume_input()
            self._held_once = not self._locker.pgconn.is_busy()
        return self._held_once

    def _doze(self, now: float) -> None:
        self._release_bell()
        # Whoever saw the lock taken has a transaction id below this: the trigger draws it
        # before it tries the lock.
        row = self._listener.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())").fetchone()
        assert row is not None  # noqa: S101
        self._doze_horizon = int(row[0])
        self._drowsy_since = now
        self._enter(State.DROWSY)

    def _all_over(self) -> bool:
        row = self._listener.execute(
            "SELECT pg_snapshot_xmin(pg_current_snapshot()) >= %s::text::xid8",
            [str(self._doze_horizon)],
        ).fetchone()
        return bool(row and row[0])

    def _release_bell(self) -> None:
        """Give the lock back, or step out of the queue for it."""
        pgconn = self._locker.pgconn
        pgconn.consume_input()
        if pgconn.is_busy():
            self._locker.cancel_safe(timeout=5)
        while (result := pgconn.get_result()) is not None:  # granted, cancelled, or lost
            if result.status == psycopg.pq.ExecStatus.FATAL_ERROR and not _is_cancel(result):
                raise psycopg.OperationalError(result.get_error_message())
        while True:
            try:
                self._locker.execute("SELECT pg_advisory_unlock_all()")
                return
            except psycopg.errors.QueryCanceled:
                continue  # the cancellation came late and hit this statement instead

    # Waiting

    def _sleep(self, timeout: float | None) -> None:
        if not self._rings:
            select.select([self._listener.fileno(), self._wake_reader], [], [], timeout)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_reader, 1024)
            self._drain()
        self._rings = 0

    def _drain(self) -> None:
        self._listener.pgconn.consume_input()
        while self._listener.pgconn.notifies():
            self._rings += 1

    def _on_notify(self, notify: psycopg.Notify) -> None:
        self._rings += 1  # it arrived while a statement ran

    def _hear_oneself(self) -> None:
        """Find out whether notifications arrive at all.

        A pooler in transaction mode (PgBouncer) accepts LISTEN and delivers nothing.
        """
        self._listener.execute("SELECT pg_notify(%s, '')", [CHANNEL])
        deadline = time.monotonic() + 2
        while not self._rings and (left := deadline - time.monotonic()) > 0:
            select.select([self._listener.fileno()], [], [], left)
            self._drain()
        self.deaf = not self._rings
        self._rings = 0
        if self.deaf:
            logger.warning(
                "LISTEN does not work on this connection, so the publisher polls every %d ms."
                " Most likely there is a pooler in transaction mode in between (PgBouncer),"
                " which breaks session locks as well: give the publisher a direct connection"
                " with --database or --dsn.",
                _DEAF_POLL * 1000,
            )


def _is_cancel(result: psycopg.pq.abc.PGresult) -> bool:
    return result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"57014"  # query_canceled
