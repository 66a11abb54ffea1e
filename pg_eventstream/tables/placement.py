"""Which databases get the tables: the project's database routers decide.

A database that is not PostgreSQL cannot have the tables. One whose router denies them would record
the migrations as applied without creating a table. A check reports both, and ``migrate``,
``sqlmigrate`` and all other commands that apply migrations refuse to run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from django.apps import AppConfig
from django.core.management.base import CommandError
from django.db import DEFAULT_DB_ALIAS, connections, migrations, router
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.state import ProjectState

from .. import models
from ..conf import conf

_LABEL = "pg_eventstream"
ROUTER = "pg_eventstream.router.EventStreamRouter"


class Problem(NamedTuple):
    """Why the migrations cannot run in a database, and what to do."""

    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.message} {self.hint}"


def find_problem(alias: str) -> Problem | None:
    """None if the migrations can run there, or if a router keeps them out."""
    answers = set(_answers(alias))
    denials = sorted(router for allowed, router in answers if not allowed)
    add_router = f'Put this router first: DATABASE_ROUTERS = ["{ROUTER}", …].'
    if alias == conf.database_alias and denials:
        return Problem(
            f"EVENTSTREAM_DATABASE is {alias!r}, but {' and '.join(denials)} keeps the tables of"
            " pg_eventstream out of that database.",
            add_router,
        )
    if len(denials) < len(answers) and connections[alias].vendor not in ("postgresql", "unknown"):
        if alias == conf.database_alias:
            add_router = "Set EVENTSTREAM_DATABASE to a PostgreSQL database. " + add_router
        return Problem(
            f"The database {alias!r} is not PostgreSQL, so it cannot have the tables of"
            " pg_eventstream, and no database router keeps them out of it.",
            add_router,
        )
    return None


def is_kept_out_of(alias: str) -> bool:
    """Whether a router denies this database everything of this package."""
    return not any(allowed for allowed, _ in _answers(alias))


def _answers(alias: str) -> Iterator[tuple[bool, str]]:
    """For the functions and each table: is it allowed there, and by which router ("" for none)."""
    # The functions are created by SQL, which belongs to no model.
    questions: list[dict[str, Any]] = [{}]
    for model in models.Event._meta.app_config.get_models():
        questions.append({"model_name": model._meta.model_name, "model": model})
    for hints in questions:
        for one in router.routers:  # as django.db.utils.ConnectionRouter.allow_migrate asks
            if hasattr(one, "allow_migrate"):
                answer = one.allow_migrate(alias, _LABEL, **hints)
                if answer is not None:
                    yield bool(answer), f"{type(one).__module__}.{type(one).__qualname__}"
                    break
        else:
            yield True, ""


def refuse_misplaced(
    app_config: AppConfig, using: str, plan: Iterable[tuple[Any, bool]], **kwargs: Any
) -> None:
    """A receiver of pre_migrate, before anything is applied or is recorded with ``--fake``.

    It lets migrations be unapplied, so that records in the wrong database can be removed
    (``migrate pg_eventstream zero --fake``).
    """
    forwards = any(step.app_label == _LABEL and not backwards for step, backwards in plan)
    if forwards and (problem := find_problem(using)):
        raise CommandError(str(problem))


class Migration(migrations.Migration):
    """The base of all migrations of this package: it refuses to run where they cannot work."""

    def apply(
        self,
        project_state: ProjectState,
        schema_editor: BaseDatabaseSchemaEditor,
        collect_sql: bool = False,
    ) -> ProjectState:
        self._refuse(schema_editor, needs_tables=not (self.initial or collect_sql))
        return super().apply(project_state, schema_editor, collect_sql)

    def unapply(
        self,
        project_state: ProjectState,
        schema_editor: BaseDatabaseSchemaEditor,
        collect_sql: bool = False,
    ) -> ProjectState:
        self._refuse(schema_editor, needs_tables=not collect_sql)
        return super().unapply(project_state, schema_editor, collect_sql)

    def _refuse(self, schema_editor: BaseDatabaseSchemaEditor, needs_tables: bool) -> None:
        connection = schema_editor.connection
        alias = connection.alias
        if problem := find_problem(alias):
            raise CommandError(str(problem))
        if not needs_tables or not router.allow_migrate(alias, _LABEL):
            return
        with connection.cursor() as cursor:
            cursor.execute("SELECT to_regclass('pg_eventstream_event') IS NULL")
            if cursor.fetchone() == (True,):
                raise CommandError(str(recorded_without_tables(alias)))


def lock_table(name: str) -> migrations.RunSQL:
    """Lock a table for the rest of the migration, without making others wait for the lock."""
    sql = Path(models.__file__).with_name("sql") / "lock_table.sql"
    return migrations.RunSQL(
        sql.read_text(encoding="utf-8").format(table=name), migrations.RunSQL.noop
    )


def recorded_without_tables(alias: str) -> Problem:
    forget = migrate_command(alias, _LABEL, "zero", "--fake")
    return Problem(
        f"The migrations of pg_eventstream are recorded as applied in the database {alias!r}, but"
        " its tables do not exist: a database router kept them out, or the migrations were"
        " recorded with --fake.",
        f"{forget}, and then {migrate_command(alias, _LABEL)}. (If the tables are in a schema that"
        " is not in this role's search_path, add it there instead.)",
    )


def migrate_command(alias: str, *arguments: str) -> str:
    elsewhere = [] if alias == DEFAULT_DB_ALIAS else ["--database", alias]
    return " ".join(["python manage.py migrate", *arguments, *elsewhere])
