"""Decides when the publisher looks for events: when the doorbell rings, or by polling.

NOTIFY takes a database-wide lock until the commit is durable (PostgreSQL:
src/backend/commands/async.c, PreCommit_Notify), so commits that notify wait for each other.
Therefore a writer rings, which means that it notifies, only if no publisher is awake. An advisory
lock, the bell lock, tells the writers (see ``sql/0001_enqueue.sql``):

asleep  the bell lock is free: writers ring, and LISTEN wakes the publisher. This is for rates at
        which the publisher is idle most of the time. Then commits seldom wait for each other in
        NOTIFY, because each round of the publisher commits and takes that lock as well.
awake   the publisher holds or requests the bell lock: writers do not ring, and the publisher polls
        every few milliseconds. This is for high rates.
drowsy  on the way from awake to asleep: the lock is free again, but a transaction that saw it taken
        could still commit. The publisher polls slowly until all of these transactions have ended.

A ring only means "look": the tables contain the truth.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import psycopg
import psycopg.generators

from ..postgres.connector import fetch_one
from ..postgres.listener import BELL, Listener
from ..postgres.locks import BELL_LOCK, LOCK_SPACE

logger = logging.getLogger(__name__)

#: Shares of the last second that were spent in rounds with events: above the first the publisher
#: becomes awake, below the second drowsy. They are shares of time and not numbers of events,
#: because the disk's speed determines how often commits can ring without waiting for each other.
BUSY, CALM = 0.5, 0.2
#: The pause while awake, in seconds. It grows with the number of events that a round finds.
_AWAKE_POLL_LEAST, _AWAKE_POLL_MOST, _AWAKE_POLL_PER_EVENT = 0.0005, 0.003, 0.0001
_DROWSY_POLL_LEAST, _DROWSY_POLL_MOST = 0.02, 0.25


class State(enum.Enum):
    ASLEEP = "asleep"
    DROWSY = "drowsy"
    AWAKE = "awake"


class Doorbell:
    """Waits until there could be something to sequence.

    ``connection`` is the one that also sequences. ``lock_connection`` is only used for the bell
    lock, because it may have to wait for it. ``safety_poll`` is the longest sleep in seconds; None
    means no limit. ``beat`` is called every ``every`` seconds of a longer sleep.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        lock_connection: psycopg.Connection[Any],
        safety_poll: float | None,
        beat: Callable[[], object] = lambda: None,
        every: float = math.inf,
    ) -> None:
        self._connection = connection
        self._lock_connection = lock_connection
        self._safety_poll = math.inf if safety_poll is None else safety_poll
        self._beat, self._every = beat, every
        #: The end and the duration of each round that found something.
        self._busy_rounds: deque[tuple[float, float]] = deque()
        self._busy_seconds = 0.0
        self._round_start = time.monotonic()
        self._drowsy_since = 0.0
        self._doze_horizon: int | None = None
        self._listener = Listener(connection, BELL)
        # Another publisher could have died a moment ago. Writers that saw it awake could still
        # commit, and its connection could even still hold the bell lock. So start awake, and do not
        # sleep before this publisher has held the lock.
        self._held_once = False
        self._awake()

    @property
    def listens(self) -> bool:
        """Whether notifications arrive. Otherwise it polls."""
        return not self._listener.deaf

    def close(self) -> None:
        with contextlib.suppress(psycopg.Error):  # a lost connection can be the reason to close
            self._release_bell()
        self._listener.close()

    def wake(self) -> None:
        """End a wait from another thread or a signal handler."""
        self._listener.wake()

    def wait(self, sequenced: int) -> None:
        """Wait for the next round. ``sequenced`` is the number of events that the last one found.

        Returns at once if the doorbell has rung in the meantime. Raises `psycopg.OperationalError`
        if a connection is lost.
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
            if busy < CALM and self._has_held_bell():
                self._doze(now)
            elif busy:
                # No writer rings. Not poll(), which is limited to whole milliseconds.
                pause = max(_AWAKE_POLL_LEAST, sequenced * _AWAKE_POLL_PER_EVENT)
                time.sleep(min(pause, _AWAKE_POLL_MOST))
                self._listener.wait(0)
            else:
                self._listener.wait(_DROWSY_POLL_LEAST)
        elif busy >= BUSY:
            # Do not wait now: from here on writers do not ring, and the last ring could be the
            # one that woke the publisher for this round.
            self._awake()
        elif self.state is State.ASLEEP:
            self._sleep(now)
        elif self._have_all_ended():
            # One more round before the sleep, for events that the last of them committed.
            self._enter(State.ASLEEP)
        else:
            # So an event waits at most a tenth longer than its late commit took.
            longer = (now - self._drowsy_since) / 10
            self._listener.wait(min(max(longer, _DROWSY_POLL_LEAST), _DROWSY_POLL_MOST))

    def _sleep(self, now: float) -> None:
        """Wait until the doorbell rings, the safety poll is due, or `wake` is called."""
        end = now + self._safety_poll
        while True:
            until = min(end, time.monotonic() + self._every)
            pause = None if until == math.inf else until - time.monotonic()
            if self._listener.wait(pause) or self._listener.woken or until == end:
                return
            if time.monotonic() < until:
                return  # it polls
            self._beat()

    def _busy(self, now: float) -> float:
        """The seconds of the last second that were spent in rounds with events."""
        while self._busy_rounds and self._busy_rounds[0][0] < now - 1:
            self._busy_seconds -= self._busy_rounds.popleft()[1]
        return self._busy_seconds if self._busy_rounds else 0.0

    # The states

    def _enter(self, state: State) -> None:
        self.state = state
        logger.debug("doorbell: %s", state.value, extra={"event": "doorbell", "state": state.value})

    def _awake(self) -> None:
        self._enter(State.AWAKE)
        if self._listener.shared:
            return  # a pooler would keep the lock after this publisher has ended
        # Sent without waiting for the result: a request in the queue for the lock is enough to make
        # the writers' attempts fail (PostgreSQL: src/backend/storage/lmgr/lock.c,
        # LockAcquireExtended checks the waiters' mask, too), and a transaction that has rung and is
        # still open cannot block the publisher.
        self._lock_connection.pgconn.send_query(
            f"SELECT pg_advisory_lock({LOCK_SPACE}, {BELL_LOCK})".encode()
        )
        self._lock_connection.pgconn.flush()

    def _has_held_bell(self) -> bool:
        if not self._held_once:
            self._lock_connection.pgconn.consume_input()
            self._held_once = not self._lock_connection.pgconn.is_busy()
        return self._held_once

    def _doze(self, now: float) -> None:
        self._release_bell()
        # Every transaction that saw the lock taken has an id below this new one, because the
        # trigger assigns the id before it tries the lock. A snapshot's xmax would not do: it is the
        # id of the last finished transaction plus one, which can be below the newest running one
        # (PostgreSQL: src/backend/storage/ipc/procarray.c, GetSnapshotData).
        (own,) = fetch_one(self._connection, "SELECT pg_current_xact_id()")
        self._doze_horizon = int(own)
        self._drowsy_since = now
        self._enter(State.DROWSY)

    def _have_all_ended(self) -> bool:
        row = self._connection.execute(
            "SELECT pg_snapshot_xmin(pg_current_snapshot()) >= %s::text::xid8",
            [str(self._doze_horizon)],
        ).fetchone()
        return bool(row and row[0])

    def _release_bell(self) -> None:
        """Release the lock, or leave the queue for it."""
        if self._listener.shared:
            return
        pgconn = self._lock_connection.pgconn
        pgconn.consume_input()
        if pgconn.is_busy():
            self._lock_connection.cancel_safe(timeout=5)
        # Granted, cancelled, or lost. Not get_result(), which waits without a limit.
        for result in self._lock_connection.wait(psycopg.generators.fetch_many(pgconn)):
            if result.status == psycopg.pq.ExecStatus.FATAL_ERROR and not _is_cancel(result):
                raise psycopg.OperationalError(result.get_error_message())
        while True:
            try:
                self._lock_connection.execute("SELECT pg_advisory_unlock_all()")
                return
            except psycopg.errors.QueryCanceled:
                continue  # the cancellation was late and has cancelled this statement


def _is_cancel(result: psycopg.pq.abc.PGresult) -> bool:
    return result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == b"57014"  # query_canceled
