"""A statement whose answer was lost on the way does not wait for ever.

Keepalives show that the next machine is there. That may be a proxy or a load balancer whose own
way on has ended, or which has forgotten the connection; or the server itself is frozen. Nor does
a clock tell: to sequence a million events takes long, and to wait for a lock takes longer. So
PostgreSQL is asked, over a new connection, whether it still works on the statement. Only if it
does not, and its answer still does not come, the connection is given up. As long as it cannot
be asked, we wait: what is frozen may go on, and what is gone is noticed by its successor.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from datetime import datetime
from typing import Any, TypeVar
from weakref import WeakSet

import psycopg

from ..limits import LIMITS, Limits

logger = logging.getLogger(__name__)

#: The longest time for anything that is no work at all.
_SOON = 8.0

_T = TypeVar("_T")


class OnStandby(psycopg.errors.ReadOnlySqlTransaction):
    """Nothing can be written, because the server follows another one."""


class WatchedConnection(psycopg.Connection[tuple[Any, ...]]):
    """Raises `psycopg.OperationalError` instead of waiting for an answer that is lost.

    Once `watch` was called.
    """

    #: Whether a pooler lends the server's session to others between our transactions. Then what
    #: belongs to a session is lost, or somebody else's: locks, LISTEN, settings.
    shared = False
    limits: Limits = LIMITS
    #: Seconds to wait for a server that neither answers nor can be asked why.
    patience = math.inf
    _ask: Callable[[], WatchedConnection]
    _session: tuple[int, datetime]
    _heard_at: float | None = None
    _done_at: float | None = None
    _said = False
    _why_given_up = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # libpq may close its own at any time, and its number may be another file's then.
        self._handle: socket.socket | None = socket.socket(fileno=os.dup(self.fileno()))
        self._handle_lock = threading.Lock()
        _open.add(self)

    def watch(self, ask: Callable[[], WatchedConnection]) -> None:
        """``ask`` makes a new connection to the same server.

        Not for connections through a pooler, which does not tell which of the server's sessions
        works for us.
        """
        # As who has logged in: whatever role is assumed since may not be told about the session.
        found = self.execute(
            "SET LOCAL ROLE NONE;"
            "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        )
        found.nextset()
        row = found.fetchone()
        assert row is not None  # noqa: S101
        self._session = row
        self._ask = ask
        _watch.add(self)

    def watch_blindly(self) -> None:
        """For a connection through a pooler: give up after `patience` seconds."""

        def ask() -> WatchedConnection:
            raise psycopg.OperationalError("a pooler does not tell which session works for us")

        self._ask = ask
        _watch.add(self)

    def pooled(self) -> bool:
        """Whether the number of our session, told at the start, was made up by a pooler."""
        row = self.execute("SELECT pg_backend_pid()").fetchone()
        return row is None or row[0] != self.info.backend_pid

    def wait(self, gen: Generator[Any, Any, _T], *args: Any, **kwargs: Any) -> _T:
        """What every statement goes through, in psycopg."""
        try:
            return super().wait(self._listening(gen), *args, **kwargs)
        except psycopg.errors.ReadOnlySqlTransaction as e:
            if self.info.parameter_status("in_hot_standby") == "on":
                raise OnStandby(*e.args) from e
            raise
        except psycopg.OperationalError as e:
            if self._why_given_up:
                raise psycopg.OperationalError(self._why_given_up) from e
            raise
        finally:
            self._heard_at = None

    def _listening(self, gen: Generator[Any, Any, _T]) -> Generator[Any, Any, _T]:
        """The same, and notes when we heard from the server last."""
        try:
            wanted, ready = next(gen), True
            while True:
                if ready:
                    self._heard_at = time.monotonic()
                ready = yield wanted
                wanted = gen.send(ready)
        except StopIteration as e:
            result: _T = e.value
            return result

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Give the connection up if this takes longer."""
        timer = threading.Timer(seconds, self.give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def give_up(self) -> None:
        """Make whoever waits for an answer fail. From any thread."""
        with self._handle_lock:
            if self._handle is not None:
                with contextlib.suppress(OSError):
                    self._handle.shutdown(socket.SHUT_RDWR)

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.close()  # which psycopg leaves out if the server has ended it

    def close(self) -> None:
        super().close()
        with self._handle_lock:
            if self._handle is not None:
                self._handle.close()
                self._handle = None
        _watch.discard(self)

    def belong_to_parent(self) -> None:
        """Forget the session, in a process that was forked.

        The parent goes on with it. It must not be told that we end, as libpq would; and it must
        end with the parent, though we may live longer with a copy of its socket. So that copy is
        closed, and libpq writes to nowhere.
        """
        self._handle_lock = threading.Lock()
        if not self.closed:
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, self.fileno(), inheritable=False)
            os.close(nothing)
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    # Called by the watch

    def look(self) -> None:
        """Give up, if the server is done and its answer does not come."""
        heard_at = self._heard_at
        if heard_at is None or time.monotonic() < heard_at + self.limits.silence:
            self._said = False
            return
        try:
            with self._ask() as other, other.within(_SOON):
                other.execute("SET ROLE NONE")  # as in `watch`
                if self._server_works(other):
                    self._done_at = None
                elif self._done_at != heard_at:
                    self._done_at = heard_at  # the answer may just be on its way
                else:
                    logger.warning("database: an answer was lost on the way; connecting again")
                    self._end_session(other)
                    self.give_up()
        except psycopg.Error as e:
            if time.monotonic() >= heard_at + self.patience:
                self._why_given_up = f"silent, and cannot be asked why: {e}"
                self.give_up()
            elif not self._said:
                logger.warning("database: silent, and cannot be asked why: %s; waiting", e)
            self._said = True

    def _server_works(self, other: WatchedConnection) -> bool:
        row = other.execute(
            # What we may not see, and what a standby does not know, counts as work; to wait for
            # us does not, which is told where track_activities is off as well.
            """
            SELECT pg_is_in_recovery() OR EXISTS (
                   SELECT FROM pg_stat_activity
                    WHERE (pid, backend_start) = (%s, %s)
                      AND coalesce(state, '') NOT LIKE 'idle%%'
                      AND wait_event IS DISTINCT FROM 'ClientRead')
            """,
            self._session,
        ).fetchone()
        return row is None or bool(row[0])

    def _end_session(self, other: WatchedConnection) -> None:
        # Its end of the connection may stay open for ever, and keep our locks.
        other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE (pid, backend_start) = (%s, %s)",
            self._session,
        )


class _Watch:
    """Looks at all connections of the process, on a thread, for as long as there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: set[WatchedConnection] = set()
        self._thread: threading.Thread | None = None

    def add(self, connection: WatchedConnection) -> None:
        with self._lock:
            self._connections.add(connection)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="pg_eventstream watch", daemon=True
                )
                self._thread.start()

    def discard(self, connection: WatchedConnection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _run(self) -> None:
        while True:
            with self._lock:
                connections = list(self._connections)
                if not connections:
                    self._thread = None
                    return
            pause = min(connection.limits.look for connection in connections)
            for connection in connections:
                try:
                    connection.look()
                except Exception:
                    logger.exception("database: unexpected error; looking again")
            del connection, connections
            time.sleep(pause)


_watch = _Watch()
_open: WeakSet[WatchedConnection] = WeakSet()


def _forget_parent() -> None:
    """In a process that was forked."""
    global _watch
    _watch = _Watch()
    for connection in list(_open):
        connection.belong_to_parent()
    _open.clear()


os.register_at_fork(after_in_child=_forget_parent)
