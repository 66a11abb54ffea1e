"""Checks of the tables: ``manage.py check --database ALIAS``, ``migrate`` and ``test`` run them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from django.apps import apps
from django.core.checks import CheckMessage, Error, Info, Tags, Warning
from django.db import connections, router
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder

from .. import models
from ..conf import conf
from ..tables.placement import migrate_command, recorded_without_tables
from .registration import register_check

_FUNCTIONS = (
    "pg_eventstream_enqueue",
    "pg_eventstream_sequence",
    "pg_eventstream_consumer_page",
    "pg_eventstream_lock_checkpoints",
    "pg_eventstream_move_checkpoints",
)
_INSTALL_TRIGGER = "python manage.py pgtrigger install pg_eventstream.Event:enqueue"
# What is found where tables or migrations are missing.
_INCOMPLETE = ("pg_eventstream.W022", "pg_eventstream.I001")
# The limit up to which unseen events are counted.
_MOST = 1000

#: Sends again what has no place, with new ids and the present time.
SEND_AGAIN = """\
WITH unseen AS (
    DELETE FROM pg_eventstream_event AS e
     WHERE NOT EXISTS (SELECT FROM pg_eventstream_stream AS s WHERE s.event_id = e.id)
       AND NOT EXISTS (SELECT FROM pg_eventstream_outbox AS o WHERE o.event_id = e.id)
    RETURNING *
)
INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids, meta)
SELECT channel, type, data, skip_user_ids, meta FROM unseen ORDER BY id;"""


@register_check(Tags.database)
def check_tables(databases: Iterable[str] | None = None, **kwargs: Any) -> Iterator[CheckMessage]:
    for alias in databases or ():
        connection = connections[alias]
        if connection.vendor != "postgresql":
            continue
        if router.allow_migrate_model(alias, models.Event):
            yield from _check_database(connection)


def _check_database(connection: BaseDatabaseWrapper) -> Iterator[CheckMessage]:
    if connection.alias != conf.database_alias:
        tables = _names_of_tables()
        if len(_fetch(connection, _MISSING_TABLES, [tables])) == len(tables):
            return  # It is allowed to hold the tables, but need not.
    found = [*check_schema(connection)]
    yield from found
    # The trigger fires at COMMIT.
    if not connection.in_atomic_block and not any(message.id in _INCOMPLETE for message in found):
        yield from _check_events(connection)


def check_schema(connection: BaseDatabaseWrapper) -> Iterator[CheckMessage]:
    """Check the tables, migrations, functions, triggers and roles, but not the events.

    Few and small tables are read, so that it is fast on any database.
    """
    tables = _names_of_tables()
    missing = [t for (t,) in _fetch(connection, _MISSING_TABLES, [tables])]
    schema = [*_check_migrations(connection, missing, has_none=len(missing) == len(tables))]
    yield from schema
    if schema:
        return
    functions = [*_check_functions(connection)]
    yield from functions or _check_triggers(connection)
    yield from _check_roles(connection)


def _names_of_tables() -> list[str]:
    app = apps.get_app_config(models.Event._meta.app_label)
    return [model._meta.db_table for model in app.get_models()]


def _check_migrations(
    connection: BaseDatabaseWrapper, missing: list[str], *, has_none: bool
) -> Iterator[CheckMessage]:
    alias = connection.alias
    applied = _fetch_applied(connection)
    unapplied = sorted(_find_migrations() - applied) if applied else []
    if has_none and applied:
        problem = recorded_without_tables(alias)
        yield Warning(problem.message, hint=problem.hint, id="pg_eventstream.W022")
    elif missing or unapplied:
        # Not an error, because "migrate" runs the checks before it begins.
        yield Info(
            f"Tables are missing from the database {alias!r}: {', '.join(missing)}."
            if missing
            else f"Migrations are not applied to the database {alias!r}: {', '.join(unapplied)}.",
            hint=f"{migrate_command(alias)}. More is checked after that.",
            id="pg_eventstream.I001",
        )


def _fetch_applied(connection: BaseDatabaseWrapper) -> set[str]:
    """The migrations that are recorded as applied; none where Django does not record them."""
    if _fetch(connection, _MAY_READ_MIGRATIONS) != [(True,)]:
        return set()
    recorded = MigrationRecorder(connection).applied_migrations()
    return {name for app, name in recorded if app == models.Event._meta.app_label}


def _find_migrations() -> set[str]:
    label = models.Event._meta.app_label
    return {name for app, name in MigrationLoader(None).disk_migrations if app == label}


def _check_functions(connection: BaseDatabaseWrapper) -> Iterator[CheckMessage]:
    missing = [f"{f}()" for (f,) in _fetch(connection, _MISSING_FUNCTIONS, [list(_FUNCTIONS)])]
    if missing:
        yield Error(
            f"The database {connection.alias!r} lacks {' and '.join(missing)}. Events cannot be"
            " sent, are not delivered, or are not handled by consumers.",
            hint="The migrations of pg_eventstream create these functions. pg_dump copies them"
            " with the schema that contains the tables, but not with single tables.",
            id="pg_eventstream.E020",
        )


def _check_triggers(connection: BaseDatabaseWrapper) -> Iterator[CheckMessage]:
    for table, trigger, enabled, as_declared, count in _fetch(connection, _TRIGGERS):
        name = connection.ops.quote_name(trigger or models.ENQUEUE.get_pgid(models.Event))  # type: ignore[arg-type]
        effect = "not delivered as promised"
        remedy = _INSTALL_TRIGGER
        if trigger is None:
            problem = "has no trigger that calls pg_eventstream_enqueue()"
        elif enabled in ("D", "R"):
            state = "disabled" if enabled == "D" else "enabled for replicas only"
            problem = f"has its trigger {name} {state}"
            remedy = f"ALTER TABLE {table} ENABLE TRIGGER {name};"
        elif not as_declared:
            problem = (
                f"has a trigger {name} that is not AFTER INSERT, DEFERRABLE INITIALLY DEFERRED,"
                " FOR EACH ROW and without a condition"
            )
        elif count > 1:
            problem = f"has {count} triggers that call pg_eventstream_enqueue()"
            effect = "delivered more than once"
            remedy = f"Drop all but one: DROP TRIGGER {name} ON {table};"
        else:
            continue
        yield Error(
            f"The table {table} of the database {connection.alias!r} {problem}: events are"
            f" {effect}.",
            hint=remedy,
            id="pg_eventstream.E021",
        )


def _check_roles(connection: BaseDatabaseWrapper) -> Iterator[CheckMessage]:
    for (who,) in _fetch(connection, _REPLICAS):
        yield Warning(
            f"session_replication_role is 'replica' for {who} in the database"
            f" {connection.alias!r}. Events sent there fire no trigger and are never delivered.",
            hint="ALTER ROLE … RESET session_replication_role, or ALTER DATABASE …. Set it only"
            " in a session that restores or copies rows.",
            id="pg_eventstream.W020",
        )


def _check_events(connection: BaseDatabaseWrapper) -> Iterator[CheckMessage]:
    [(allowed,)] = _fetch(connection, _MAY_READ)
    if not allowed:
        return
    [(count,)] = _fetch(connection, _UNSEEN, [_MOST])
    if count:
        yield Warning(
            f"{'At least ' if count == _MOST else ''}{count} events in the database"
            f" {connection.alias!r} have no place in the order, because the trigger did not see"
            " them. They are never delivered, and are pruned when they are older than"
            " EVENTSTREAM_RETENTION.",
            hint="They were inserted while the trigger was disabled, in a session with"
            " session_replication_role = replica, or by logical replication. To send them"
            f" now:\n{SEND_AGAIN}",
            id="pg_eventstream.W021",
        )


def _fetch(
    connection: BaseDatabaseWrapper, query: str, params: list[Any] | None = None
) -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(query, params)
        return list(cursor.fetchall())


_MISSING_TABLES = "SELECT name FROM unnest(%s::text[]) AS name WHERE to_regclass(name) IS NULL"

_MAY_READ_MIGRATIONS = """
    SELECT has_table_privilege(oid, 'SELECT') FROM pg_class
     WHERE oid = to_regclass('django_migrations')
"""

_MISSING_FUNCTIONS = "SELECT name FROM unnest(%s::text[]) AS name WHERE to_regproc(name) IS NULL"

# The triggers of every table that stores events: partitions and child tables have their own. The
# bits of tgtype: include/catalog/pg_trigger.h
_TRIGGERS = """
    WITH RECURSIVE stored (oid) AS (
        SELECT 'pg_eventstream_event'::regclass::oid
        UNION
        SELECT inhrelid FROM pg_inherits JOIN stored ON inhparent = stored.oid
    )
    SELECT c.oid::regclass::text, tgname, tgenabled,
           tgtype = 5 AND tgdeferrable AND tginitdeferred AND tgqual IS NULL,
           count(*) FILTER (WHERE tgenabled IN ('O', 'A')) OVER (PARTITION BY c.oid)
      FROM stored JOIN pg_class AS c ON c.oid = stored.oid
      LEFT JOIN pg_trigger ON tgrelid = c.oid
            AND tgfoid = 'pg_eventstream_enqueue()'::regprocedure
     WHERE c.relkind = 'r'
     ORDER BY c.oid, tgname
"""

_REPLICAS = """
    SELECT coalesce('the role ' || nullif(setrole, 0)::regrole, 'all roles')
      FROM pg_db_role_setting
      LEFT JOIN pg_database AS d ON d.oid = setdatabase
     WHERE 'session_replication_role=replica' = ANY (setconfig)
       AND (setdatabase = 0 OR datname = current_database())
    UNION
    SELECT 'this connection' WHERE current_setting('session_replication_role') = 'replica'
"""

_MAY_READ = """
    SELECT has_column_privilege('pg_eventstream_event', 'id', 'SELECT')
       AND has_column_privilege('pg_eventstream_stream', 'event_id', 'SELECT')
       AND has_column_privilege('pg_eventstream_outbox', 'event_id', 'SELECT')
"""

_UNSEEN = """
    SELECT count(*) FROM (
        SELECT FROM pg_eventstream_event AS e
         WHERE NOT EXISTS (SELECT FROM pg_eventstream_stream AS s WHERE s.event_id = e.id)
           AND NOT EXISTS (SELECT FROM pg_eventstream_outbox AS o WHERE o.event_id = e.id)
         LIMIT %s) AS unseen
"""
