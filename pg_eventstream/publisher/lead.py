"""The lead: one session lock, which the publisher that publishes holds exclusively.

Processes of the application that sequence events hold it in share mode, for one statement each. So
they stop when a publisher leads. When they are busy, one of them always holds it, and an attempt to
take it fails. While a request waits for the lock, none of their attempts succeeds (PostgreSQL:
src/backend/storage/lmgr/lock.c, LockAcquireExtended), so it gets the lock as soon as their current
statements end.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg

from ..errors import NotLeading
from ..postgres.locks import LEADER_LOCK, LOCK_SPACE
from ..postgres.watchdog import WatchedConnection

#: The role of a session that leads in order to publish once.
ONCE = "once"
_KEY = f"{LOCK_SPACE}, {LEADER_LOCK}"


def try_lead(connection: WatchedConnection) -> bool:
    """Take the lead if no other session holds its lock now."""
    # A pooler would keep the session lock after this publisher has ended, and no other could lead.
    # Without it, this publisher at least gives way to a leader that has a direct connection.
    lock = "pg_try_advisory_xact_lock" if connection.shared else "pg_try_advisory_lock"
    return _is_true(connection, f"SELECT {lock}({_KEY})")


def lead(connection: WatchedConnection, seconds: float) -> bool:
    """Take the lead if no publisher leads. Waits ``seconds`` for the application's processes."""
    if try_lead(connection):
        return True
    has_no_leader = _is_true(connection, f"SELECT pg_try_advisory_xact_lock_shared({_KEY})")
    return has_no_leader and _wait_in_line(connection, seconds)


def lead_once(connection: WatchedConnection, seconds: float) -> None:
    """Take the lead to publish once. Waits ``seconds`` for others that publish once, as well.

    Raises `NotLeading`, which names the leader.
    """
    if try_lead(connection):
        return
    leader = _leader(connection)
    if leader is None or leader.is_done_soon:
        if _wait_in_line(connection, seconds):
            return
        leader = _leader(connection)
    if leader is not None:
        raise NotLeading(f"{leader} leads and publishes already; there is nothing to do here.")
    holders = ", ".join(map(str, _holders(connection))) or "none any more"
    raise NotLeading(
        f"No publisher leads, but for {seconds:g} seconds other sessions have held the lock that a"
        f" leader needs: {holders}. Processes of the application hold it for a moment while they"
        " put events in order. See pg_stat_activity for what these sessions wait for."
    )


def leader_name(connection: psycopg.Connection[Any]) -> str:
    """The name of the leader, for the log."""
    return str(_leader(connection) or "another publisher")


@dataclass(frozen=True, slots=True)
class _Holder:
    """A session that holds the lock. ``name`` is the publisher's name, if it has registered."""

    pid: int
    exclusive: bool
    application: str
    address: str | None
    name: str | None

    @property
    def is_done_soon(self) -> bool:
        return self.application == f"pg_eventstream {ONCE}"

    def __str__(self) -> str:
        session = f"PostgreSQL session {self.pid}"
        if self.name is not None:
            return f"publisher {self.name} ({session})"
        where = [self.application, f"from {self.address}" if self.address else ""]
        about = " ".join(filter(None, where))
        return f"{session} ({about})" if about else session


def _leader(connection: psycopg.Connection[Any]) -> _Holder | None:
    return next((holder for holder in _holders(connection) if holder.exclusive), None)


def _holders(connection: psycopg.Connection[Any]) -> list[_Holder]:
    # The table has the name of the previous leader until the current one registers, which it does
    # after its session has begun. Columns that may not be seen are null.
    rows = connection.execute(
        """
        SELECT pid, mode = 'ExclusiveLock', coalesce(application_name, ''), host(client_addr), name
          FROM pg_locks
          LEFT JOIN pg_stat_activity USING (pid)
          LEFT JOIN pg_eventstream_publisher
                 ON leading_since >= backend_start AND application_name LIKE 'pg_eventstream %%'
         WHERE locktype = 'advisory' AND granted
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND classid = 'pg_eventstream_event'::regclass AND objid = %s AND objsubid = 2
         ORDER BY pid
        """,
        [LEADER_LOCK],
    ).fetchall()
    return [_Holder(*row) for row in rows]


def _wait_in_line(connection: WatchedConnection, seconds: float) -> bool:
    """Wait for the lock, briefly: a waiting statement holds a snapshot, which hinders vacuum."""
    lock = "pg_advisory_xact_lock" if connection.shared else "pg_advisory_lock"
    with suppress(psycopg.errors.LockNotAvailable), connection.transaction():
        connection.execute(
            "SELECT set_config('lock_timeout', %s, true)", [str(round(seconds * 1000))]
        )
        connection.execute(f"SELECT {lock}({_KEY})")
        return True
    return False


def _is_true(connection: psycopg.Connection[Any], query: str) -> bool:
    row = connection.execute(query).fetchone()
    return bool(row and row[0])
