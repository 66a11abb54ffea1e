"""Gives up a statement whose response was lost, so that it does not wait without end.

Keepalives only show that the next machine is there. That can be a proxy or a load balancer that has
lost its own connection or has forgotten this one, or the server itself can be frozen. A timeout
does not help: sequencing a million events takes long, and waiting for a lock takes longer. So
PostgreSQL is asked, over a new connection, whether it still works on the statement. Only if it does
not, and the response still does not arrive, the connection is given up. While the server cannot be
asked, the statement waits: a frozen server can continue, and the successor of a dead one notices
that it is gone.
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

#: The maximum seconds for anything that is no real work.
_SOON = 8.0

_T = TypeVar("_T")


class OnStandby(psycopg.errors.ReadOnlySqlTransaction):
    """Nothing can be written, because the server is a standby."""


class WatchedConnection(psycopg.Connection[tuple[Any, ...]]):
    """Raises `psycopg.OperationalError` instead of waiting for a response that was lost.

    It does so after `watch` was called.
    """

    #: Whether a pooler shares the server's session with other clients between transactions. Then
    #: everything that belongs to a session is lost or shared: locks, LISTEN, settings.
    shared = False
    limits: Limits = LIMITS
    #: Seconds to wait for a server that neither responds nor can be asked why.
    patience = math.inf
    _ask: Callable[[], WatchedConnection]
    _session: tuple[int, datetime]
    _heard_at: float | None = None
    _done_at: float | None = None
    _warned = False
    _why_given_up = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # libpq can close its own socket at any time, and another file can then have its number.
        self._handle: socket.socket | None = socket.socket(fileno=os.dup(self.fileno()))
        self._handle_lock = threading.Lock()
        _open.add(self)

    def watch(self, ask: Callable[[], WatchedConnection]) -> None:
        """Watch the connection. ``ask`` opens another connection to the same server.

        Not for connections through a pooler, which does not tell which session of the server runs
        their statements.
        """
        # As the role that logged in: a role that was assumed later may not see the session.
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

    def watch_patience(self) -> None:
        """For a connection through a pooler: give up after `patience` seconds."""

        def ask() -> WatchedConnection:
            raise psycopg.OperationalError("a pooler does not tell which session it uses")

        self._ask = ask
        _watch.add(self)

    def pooled(self) -> bool:
        """Whether a pooler made up the session's number that was sent when connecting."""
        row = self.execute("SELECT pg_backend_pid()").fetchone()
        return row is None or row[0] != self.info.backend_pid

    def wait(self, gen: Generator[Any, Any, _T], *args: Any, **kwargs: Any) -> _T:
        """Run a statement. psycopg calls this for every statement."""
        try:
            return super().wait(self._note_responses(gen), *args, **kwargs)
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

    def _note_responses(self, gen: Generator[Any, Any, _T]) -> Generator[Any, Any, _T]:
        """Run ``gen``, and note when the server last sent something."""
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
        """Give up the connection if the block takes longer."""
        timer = threading.Timer(seconds, self.give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def give_up(self) -> None:
        """Make a statement that waits for a response fail. Can be called from any thread."""
        with self._handle_lock:
            if self._handle is not None:
                with contextlib.suppress(OSError):
                    self._handle.shutdown(socket.SHUT_RDWR)

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.close()  # psycopg does not do this if the server has ended the connection

    def close(self) -> None:
        super().close()
        with self._handle_lock:
            if self._handle is not None:
                self._handle.close()
                self._handle = None
        _watch.discard(self)

    def leave_to_parent(self) -> None:
        """Forget the session, in a process that was forked.

        The parent continues to use it. This process must not end the session, as libpq would; and
        the session must end with the parent, even if this process lives longer with a copy of the
        socket. So the copy is closed, and libpq writes to /dev/null.
        """
        self._handle_lock = threading.Lock()
        if not self.closed:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, self.fileno(), inheritable=False)
            os.close(null)
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    # Called by the watch

    def look(self) -> None:
        """Give up if the server has finished and its response does not arrive."""
        heard_at = self._heard_at
        if heard_at is None or time.monotonic() < heard_at + self.limits.silence:
            self._warned = False
            return
        try:
            with self._ask() as other, other.within(_SOON):
                other.execute("SET ROLE NONE")  # as in `watch`
                if self._server_is_busy(other):
                    self._done_at = None
                elif self._done_at != heard_at:
                    self._done_at = heard_at  # the response could still be on its way
                else:
                    logger.warning(
                        "database: a response was lost on the way; connecting again",
                        extra={"event": "database-response-lost"},
                    )
                    self._end_session(other)
                    self.give_up()
        except psycopg.Error as e:
            if time.monotonic() >= heard_at + self.patience:
                self._why_given_up = f"silent, and cannot be asked why: {e}"
                self.give_up()
            elif not self._warned:
                logger.warning(
                    "database: silent, and cannot be asked why: %s; waiting",
                    e,
                    extra={"event": "database-silent"},
                )
            self._warned = True

    def _server_is_busy(self, other: WatchedConnection) -> bool:
        row = other.execute(
            # A state that may not be seen, or that a standby does not know, counts as work.
            # Waiting for the client does not, and is visible even if track_activities is off.
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
        # The server's end of the connection could stay open without end and keep the locks.
        other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE (pid, backend_start) = (%s, %s)",
            self._session,
        )


class _Watch:
    """Watches all connections of the process, on a thread that runs while there are any."""

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
                    logger.exception(
                        "database: unexpected error; trying again",
                        extra={"event": "unexpected-error", "part": "watchdog"},
                    )
            del connection, connections
            time.sleep(pause)


_watch = _Watch()
_open: WeakSet[WatchedConnection] = WeakSet()


def _forget_parent() -> None:
    """Leave the connections to the parent, in a process that was forked."""
    global _watch
    _watch = _Watch()
    for connection in list(_open):
        connection.leave_to_parent()
    _open.clear()


os.register_at_fork(after_in_child=_forget_parent)
