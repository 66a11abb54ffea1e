"""When does the publisher look for events? When it rings, or often enough.

NOTIFY takes a database-wide lock until the commit is durable (PostgreSQL:
src/backend/commands/async.c, PreCommit_Notify), so commits that notify queue up behind
each other. Writers therefore ring only if nobody is awake, which they learn from an
advisory lock, the bell lock (see ``sql/0001_enqueue.sql``):

asleep  the bell lock is free: writers ring, and LISTEN wakes us. For as many events as
        leave us idle most of the time; then commits seldom meet in that lock either, since
        each of our rounds commits as well, and takes it.
awake   the bell lock is held or requested by us: writers stay silent, and we poll every
        millisecond or a few. For a flood of events.
drowsy  on the way from awake to asleep: the lock is free again, but a transaction that
        saw it taken may commit yet. We poll slowly until all of those are over.

A ring says nothing but "look": the tables are the truth.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import time
from collections import deque
from typing import Any

import psycopg
import psycopg.generators

from ..postgres.connector import fetch_one
from ..postgres.listener import BELL, Listener
from ..postgres.locks import BELL_LOCK, LOCK_SPACE

logger = logging.getLogger(__name__)

#: The share of the last second that rounds which found something took: above the first wake
#: up, below the second doze. It is of time, not a number of events, because how often commits
#: may ring without waiting for each other depends on how long the disk takes.
BUSY, CALM = 0.5, 0.2
#: A pause while awake. The more events a round finds, the less often it is worth its cost.
_AWAKE_POLL_LEAST, _AWAKE_POLL_MOST, _AWAKE_POLL_PER_EVENT = 0.0005, 0.003, 0.0001
_DROWSY_POLL_LEAST, _DROWSY_POLL_MOST = 0.02, 0.25


class State(enum.Enum):
    ASLEEP = "asleep"
    DROWSY = "drowsy"
    AWAKE = "awake"


class Doorbell:
    """Waits until there may be something to sequence.

    ``connection`` is the one that also sequences. ``lock_connection`` holds the bell lock and
    nothing else, because it may have to wait for it. ``safety_poll`` is the longest sleep in
    seconds, None for no limit.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        lock_connection: psycopg.Connection[Any],
        safety_poll: float | None,
    ) -> None:
        self._connection = connection
        self._lock_connection = lock_connection
        self._safety_poll = safety_poll
        #: When each round that found something ended, and how long it took.
        self._busy_rounds: deque[tuple[float, float]] = deque()
        self._busy_seconds = 0.0
        self._round_start = time.monotonic()
        self._drowsy_since = 0.0
        self._doze_horizon: int | None = None
        self._listener = Listener(connection, BELL)
        # Another publisher may have died a moment ago, and writers that saw it awake may
        # not have committed yet; its connection may even linger and hold the bell lock.
        # So start awake, and do not sleep before the lock was ours once.
        self._held_once = False
        self._awake()

    def close(self) -> None:
        with contextlib.suppress(psycopg.Error):  # the connection may be what ended us
            self._release_bell()
        self._listener.close()

    def wake(self) -> None:
        """End a wait from another thread or a signal handler."""
        self._listener.wake()

    def wait(self, sequenced: int) -> None:
        """Wait for the next round, given how many events the last one found.

        Returns at once if it rang since. Raises `psycopg.OperationalError` if a connection
        is lost.
        """
        now = time.monotonic()
        if sequenced:
            self._busy_rounds.append((now, now - self._round_start))
            self._busy_seconds += now - self._round_start
        self._wait(now, sequenced)
        self._round_start = time.monotonic()

    def _wait(self, now: float, sequenced: int) -> None:
        busy = self._busy(now)
        if self.state is State.AWAKE:
            if busy < CALM and self._bell_was_ours():
                self._doze(now)
            elif busy:
                # Nobody rings. Not poll(), which knows but whole milliseconds.
                pause = max(_AWAKE_POLL_LEAST, sequenced * _AWAKE_POLL_PER_EVENT)
                time.sleep(min(pause, _AWAKE_POLL_MOST))
                self._listener.wait(0)
            else:
                self._listener.wait(_DROWSY_POLL_LEAST)
        elif busy >= BUSY:
            # Not to sleep now: writers fall silent with this, and the last of them that rang
            # may be the one that woke us for this round.
            self._awake()
        elif self.state is State.ASLEEP:
            self._listener.wait(self._safety_poll)
        elif self._all_over():
            # One more round before the sleep: for what the last of them committed.
            self._enter(State.ASLEEP)
        else:
            # A straggler waits a tenth longer than its commit took anyway.
            longer = (now - self._drowsy_since) / 10
            self._listener.wait(min(max(longer, _DROWSY_POLL_LEAST), _DROWSY_POLL_MOST))

    def _busy(self, now: float) -> float:
        """How much of the last second went into rounds that found something."""
        while self._busy_rounds and self._busy_rounds[0][0] < now - 1:
            self._busy_seconds -= self._busy_rounds.popleft()[1]
        return self._busy_seconds if self._busy_rounds else 0.0

    # The states

    def _enter(self, state: State) -> None:
        self.state = state
        logger.debug("doorbell: %s", state.value)

    def _awake(self) -> None:
        self._enter(State.AWAKE)
        if self._listener.shared:
            return  # a pooler would keep the lock when we are gone
        # Sent without waiting for the answer: to stand in the queue for the lock is enough
        # to make the writers' attempts fail (PostgreSQL: src/backend/storage/lmgr/lock.c,
        # LockAcquireExtended checks the waiters' mask too), and a transaction that rang and
        # is not over yet cannot hold us up.
        self._lock_connection.pgconn.send_query(
            f"SELECT pg_advisory_lock({LOCK_SPACE}, {BELL_LOCK})".encode()
        )
        self._lock_connection.pgconn.flush()

    def _bell_was_ours(self) -> bool:
        if not self._held_once:
            self._lock_connection.pgconn.consume_input()
            self._held_once = not self._lock_connection.pgconn.is_busy()
        return self._held_once

    def _doze(self, now: float) -> None:
        self._release_bell()
        # Whoever saw the lock taken has a transaction id below this one, which is drawn now: the
        # trigger draws its own before it tries the lock. A snapshot's xmax would not do: it is
        # that of the last transaction that is over, plus one, and so perhaps below the newest
        # that runs (PostgreSQL: src/backend/storage/ipc/procarray.c, GetSnapshotData).
        (own,) = fetch_one(self._connection, "SELECT pg_current_xact_id()")
        self._doze_horizon = int(own)
        self._drowsy_since = now
        self._enter(State.DROWSY)

    def _all_over(self) -> bool:
        row = self._connection.execute(
            "SELECT pg_snapshot_xmin(pg_current_snapshot()) >= %s::text::xid8",
            [str(self._doze_horizon)],
        ).fetchone()
        return bool(row and row[0])

    def _release_bell(self) -> None:
        """Give the lock back, or step out of the queue for it."""
        if self._listener.shared:
            return
        pgconn = self._lock_connection.pgconn
        pgconn.consume_input()
        if pgconn.is_busy():
            self._lock_connection.cancel_safe(timeout=5)
        # Granted, cancelled, or lost. Not get_result(), which waits for an answer for ever.
        for result in self._lock_connection.wait(psycopg.generators.fetch_many(pgconn)):
            if result.status == psycopg.pq.ExecStatus.FATAL_ERROR and not _is_cancel(result):
                raise psycopg.OperationalError(result.get_error_message())
        while True:
            try:
                self._lock_connection.execute("SELECT pg_advisory_unlock_all()")
                return
            except psycopg.errors.QueryCanceled:
                continue  # the cancellation came late and hit this statement instead


def _is_cancel(result: psycopg.pq.abc.PGresult) -> bool:
    return result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"57014"  # query_canceled
