"""Checks of the tables themselves: ``manage.py check --database ALIAS``, ``migrate``, ``test``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from django.apps import apps
from django.core.checks import CheckMessage, Error, Info, Tags, Warning, register
from django.db import connections, router
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder

from .. import models
from ..conf import conf
from ..publisher.unseen import SEND_AGAIN
from ..tables.placement import migrate_command, recorded_without_tables

_FUNCTIONS = ("pg_eventstream_enqueue()", "pg_eventstream_sequence()")
# How many unseen events are counted.
_MOST = 1000


@register(Tags.database)
def check_tables(databases: Iterable[str] | None = None, **kwargs: Any) -> list[CheckMessage]:
    return [
        message
        for alias in databases or ()
        if connections[alias].vendor == "postgresql"
        and router.allow_migrate_model(alias, models.Event)
        for message in _check(connections[alias])
    ]


def _check(connection: BaseDatabaseWrapper) -> Iterator[CheckMessage]:
    app = apps.get_app_config(models.Event._meta.app_label)
    tables = [model._meta.db_table for model in app.get_models()]
    missing = [t for (t,) in _fetch(connection, _MISSING_TABLES, [tables])]
    if len(missing) == len(tables) and connection.alias != conf.database_alias:
        return  # It could hold them.
    applied = _applied(connection)
    if len(missing) == len(tables) and applied:
        yield Warning(
            recorded_without_tables(connection.alias).message,
            hint=recorded_without_tables(connection.alias).hint,
            id="pg_eventstream.W022",
        )
        return
    unapplied = sorted(_known() - applied) if applied else []
    if missing or unapplied:
        # No error, since "migrate" checks before it begins.
        lack = f"Tables are missing in {connection.alias!r}: {', '.join(missing)}."
        behind = f"Migrations are not applied to {connection.alias!r}: {', '.join(unapplied)}."
        yield Info(
            lack if missing else behind,
            hint=f"{migrate_command(connection.alias)}. More is checked then.",
            id="pg_eventstream.I001",
        )
        return
    functions = [f for (f,) in _fetch(connection, _MISSING_FUNCTIONS, [list(_FUNCTIONS)])]
    if functions:
        yield Error(
            f"The database {connection.alias!r} lacks {' and '.join(functions)}, so that events"
            " cannot be sent or are not delivered.",
            hint="They are created by the migrations of pg_eventstream; pg_dump copies them with"
            " the schema that the tables are in.",
            id="pg_eventstream.E020",
        )
    else:
        yield from _check_trigger(connection)
    yield from _check_roles(connection)
    if not connection.in_atomic_block:  # The trigger fires at COMMIT.
        yield from _check_events(connection)


def _applied(connection: BaseDatabaseWrapper) -> set[str]:
    """The migrations that are recorded, where Django applies them at all."""
    if _fetch(connection, _MAY_READ_MIGRATIONS) != [(True,)]:
        return set()
    recorded = MigrationRecorder(connection).applied_migrations()
    return {name for app, name in recorded if app == models.Event._meta.app_label}


def _known() -> set[str]:
    label = models.Event._meta.app_label
    return {name for app, name in MigrationLoader(None).disk_migrations if app == label}


def _check_trigger(connection: BaseDatabaseWrapper) -> Iterator[CheckMessage]:
    for table, trigger, enabled, as_declared, number in _fetch(connection, _TRIGGERS):
        name = connection.ops.quote_name(trigger or models.ENQUEUE.get_pgid(models.Event))  # type: ignore[arg-type]
        again = f"ALTER TABLE {table} ENABLE TRIGGER {name};"
        if trigger is None:
            problem = "has no trigger that calls pg_eventstream_enqueue()"
            again = "python manage.py pgtrigger install pg_eventstream.Event:enqueue"
        elif enabled == "D":
            problem = f"has its trigger {name} disabled"
        elif enabled == "R":
            problem = f"has its trigger {name} enabled for replicas only"
        elif not as_declared:
            problem = (
                f"has a trigger {name} that is not AFTER INSERT, DEFERRABLE INITIALLY DEFERRED,"
            )
            problem += " FOR EACH ROW and without a condition"
            again = "python manage.py pgtrigger install pg_eventstream.Event:enqueue"
        elif number > 1:
            problem = f"has {number} triggers that call pg_eventstream_enqueue()"
            again = f"All but one are too many: DROP TRIGGER {name} ON {table};"
        else:
            continue
        yield Error(
            f"The table {table} of the database {connection.alias!r} {problem}: events are"
            f" {'delivered more than once' if number > 1 else 'not delivered as promised'}.",
            hint=again,
            id="pg_eventstream.E021",
        )


def _check_roles(connection: BaseDatabaseWrapper) -> Iterator[CheckMessage]:
    for (who,) in _fetch(connection, _REPLICAS):
        yield Warning(
            f"session_replication_role is 'replica' for {who} in the database"
            f" {connection.alias!r}: what is sent there fires no trigger, and is never delivered.",
            hint="ALTER ROLE … RESET session_replication_role, or ALTER DATABASE …; set it in the"
            " session that restores or copies rows, only.",
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
            f" {connection.alias!r} have no place in the order: the trigger did not see them. They"
            " are never delivered, and pruned when they are older than EVENTSTREAM_RETENTION.",
            hint="They came while the trigger was disabled, with session_replication_role ="
            f" replica, or by logical replication. To send them now:\n{SEND_AGAIN}",
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

_MISSING_FUNCTIONS = (
    "SELECT name FROM unnest(%s::text[]) AS name WHERE to_regprocedure(name) IS NULL"
)

# Of every table that events are stored in: with partitions or heirs there are several. The bits
# of tgtype: include/catalog/pg_trigger.h
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
