"""Opens private connections to PostgreSQL, in addition to Django's.

They live as long as the process and hold session locks and LISTEN, so no other code may share, pool
or close them.
"""

from __future__ import annotations

import math
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from ..limits import LIMITS, Limits
from .watchdog import OnStandby, WatchedConnection

# Both sides notice within about 15 seconds that the other one has vanished (power, network), so
# that a dead leader does not keep its lock. Text is Unicode, even if the database has no encoding
# (SQL_ASCII).
_PARAMETERS: dict[str, Any] = {
    "client_encoding": "UTF8",
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "connect_timeout": 4,
}
_PROBE = "pg_eventstream_probe"
# Settings of a role or a database that suit web requests or people must not affect a daemon that
# sleeps for hours and can sequence a million events in one statement. The names are looked up in
# pg_settings, so a server without a setting is no problem. Settings that limit memory, disk or
# access, or that determine where the tables are, remain those of the role.
_SESSION = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "3",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "0",
    "lock_timeout": "0",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "exit_on_error": "off",
    # Allows writing, and lets each statement see everything committed before it.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    # The formats of the values that psycopg reads and writes.
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "array_nulls": "on",
    "standard_conforming_strings": "on",
    "transform_null_equals": "off",
    # Statements are short and use keys.
    "jit": "off",
    "plan_cache_mode": "auto",
}
# Set first and separately, because they could end the statement that sets the others.
_STATEMENT_TIMEOUTS = {"statement_timeout": 0, "transaction_timeout": 170000}
# Not allowed for every role, or not possible on every platform.
_IF_POSSIBLE = [
    # A statement that runs or waits ends soon after this process, and releases its locks.
    "SET client_connection_check_interval = '1s'",
    "SET track_activities = on",
]


@dataclass(frozen=True, slots=True)
class Connector:
    """Where to connect: a Django database alias, or a libpq connection string."""

    alias: str
    dsn: str | None = None
    limits: Limits = LIMITS

    def connect(self, role: str, *, patience: float = math.inf) -> WatchedConnection:
        """Open an autocommit connection, shown as ``pg_eventstream ROLE`` in pg_stat_activity.

        It waits at most ``patience`` seconds for a lock, or for a server that is silent and cannot
        be asked why. Raises `psycopg.OperationalError` if the server cannot be reached.
        """
        connection = self._open(role)
        connection.patience = patience
        try:
            with connection.within(self.limits.set_up):
                pooled = connection.pooled()
                connection.shared = pooled and not self._can_listen(connection)
                if connection.shared:
                    # Statements run in sessions that have prepared nothing and that the
                    # application uses as well, so no settings are changed.
                    connection.prepare_threshold = None
                else:
                    self._set_up(connection)
                if not pooled:
                    connection.watch(lambda: self._open("watch"))
                elif patience < math.inf:
                    connection.watch_patience()
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self, role: str) -> WatchedConnection:
        if self.dsn is not None:
            params: dict[str, Any] = {"conninfo": self.dsn}
        else:
            refuse_if_not_postgresql(self.alias)
            params = connections[self.alias].get_connection_params()
            # Django's cursor class and type adapters belong to Django's connections.
            for name in ("cursor_factory", "context", "prepare_threshold"):
                params.pop(name, None)
        params = {**_PARAMETERS, **params, "application_name": f"pg_eventstream {role}"}
        connection = WatchedConnection.connect(**params, autocommit=True)
        connection.limits = self.limits
        return connection

    def _can_listen(self, connection: WatchedConnection) -> bool:
        """Whether LISTEN works, which means that the pooler keeps one session for the connection.

        A notification from this connection proves nothing, because it arrives within the
        transaction. Nor does one from another connection that runs the same test, because the
        pooler could lend its session to this one.
        """
        try:
            connection.execute(f"LISTEN {_PROBE}")
        except OnStandby:
            return False
        payload = uuid.uuid4().hex
        with self._open("probe") as other:
            other.execute("SELECT pg_notify(%s, %s)", [_PROBE, payload], prepare=False)
        notifies = connection.notifies(timeout=self.limits.probe)
        received = any(notify.payload == payload for notify in notifies)
        notifies.close()
        connection.execute(f"UNLISTEN {_PROBE}")
        return received

    def _set_up(self, connection: WatchedConnection) -> None:
        for name, since in _STATEMENT_TIMEOUTS.items():
            if connection.info.server_version >= since:
                connection.execute(f"SET {name} = 0")
        session = dict(_SESSION)
        if connection.patience < math.inf:
            session["lock_timeout"] = str(round(connection.patience * 1000))
        connection.execute(
            "SELECT set_config(name, value, false) FROM pg_settings"
            " JOIN unnest(%s::text[], %s::text[]) AS wanted (name, value) USING (name)",
            [list(session), list(session.values())],
        )
        for statement in _IF_POSSIBLE:
            with suppress(
                psycopg.errors.InvalidParameterValue, psycopg.errors.InsufficientPrivilege
            ):
                connection.execute(statement)
        if self.dsn is not None:
            return
        if assume_role := connections[self.alias].settings_dict["OPTIONS"].get("assume_role"):
            connection.execute(
                psycopg.sql.SQL("SET ROLE {}").format(psycopg.sql.Identifier(assume_role))
            )

    def __str__(self) -> str:
        if self.dsn is not None:
            info = psycopg.conninfo.conninfo_to_dict(self.dsn)
            return f"{info.get('dbname', '')}@{info.get('host', 'local')}:{info.get('port', 5432)}"
        settings = connections[self.alias].settings_dict
        where = f"{settings['HOST'] or 'local'}:{settings['PORT'] or 5432}"
        return f"{settings['NAME']}@{where} (alias {self.alias!r})"


def refuse_if_not_postgresql(alias: str) -> None:
    """Raise `ImproperlyConfigured` if this database alias is not PostgreSQL."""
    if connections[alias].vendor != "postgresql":
        raise ImproperlyConfigured(
            f"The database {alias!r} is not PostgreSQL, so it cannot hold the events. Set"
            " EVENTSTREAM_DATABASE to a PostgreSQL database."
        )


def fetch_one(
    connection: psycopg.Connection[Any], query: str, params: Any = None
) -> tuple[Any, ...]:
    """The row of a query that always returns one."""
    row = connection.execute(query, params).fetchone()
    assert row is not None, query  # noqa: S101
    return tuple(row)


def plain_sql() -> Path:
    """The directory of the tables without Django, and of the GRANTs."""
    package = Path(__file__).parents[1]
    installed = package / "plain_sql"  # as a wheel puts them there; in a checkout they are beside
    return installed if installed.exists() else package.parent / "migrations"


def explain(error: psycopg.Error) -> str:
    """The database's message, with a remedy if there is a known one."""
    message = str(error).strip()
    match error:
        case psycopg.errors.UndefinedTable() | psycopg.errors.UndefinedFunction():
            message += (
                " - are the migrations applied here? (manage.py migrate)"
                " Is their schema in this role's search_path?"
            )
        case psycopg.errors.LockNotAvailable():
            message += (
                " - another session holds a lock; to find it, run while the command waits:"
                " SELECT pid, pg_blocking_pids(pid), query FROM pg_stat_activity"
            )
        case psycopg.errors.InsufficientPrivilege():
            message += f" - the GRANTs that each role needs are in {plain_sql()}/README.md"
        case OnStandby():
            message += (
                " - this is a standby; to find the primary among several hosts, list them all"
                " and set target_session_attrs=read-write"
            )
        case psycopg.errors.ReadOnlySqlTransaction():
            message += (
                " - default_transaction_read_only is on for this role or database; a direct"
                " connection can turn it off, one through a pooler cannot"
            )
    return message
