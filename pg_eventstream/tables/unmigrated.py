"""Creates the tables where a project has switched migrations off, mostly for test databases.

Django then creates tables from the models (``migrate --run-syncdb``). It does not create the SQL
functions, without which the trigger cannot be created. So the migrations of this package run
before Django looks for missing tables. They depend on no other app and are not recorded.
"""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.db import connections
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.state import ProjectState

from .placement import is_kept_out_of


class _OwnMigrations(MigrationLoader):
    """Loads the migrations of this app alone, even where ``MIGRATION_MODULES`` disables them."""

    def __init__(self, app: AppConfig) -> None:
        self._app = app
        super().__init__(None)

    def migrations_module(self, app_label: str) -> tuple[str | None, bool]:  # type: ignore[override]
        is_own = app_label == self._app.label
        return (f"{self._app.name}.migrations" if is_own else None), True


def create_tables(app_config: AppConfig, using: str, **kwargs: Any) -> None:
    """A receiver of pre_migrate: create the tables if they are missing and Django will not."""
    connection = connections[using]
    if app_config.label not in MigrationLoader(None, ignore_no_migrations=True).unmigrated_apps:
        return
    if is_kept_out_of(using):
        return
    tables = {model._meta.db_table for model in app_config.get_models()}
    if tables.intersection(connection.introspection.table_names()):
        return
    loader = _OwnMigrations(app_config)
    state = ProjectState()
    for key in loader.graph.leaf_nodes(app_config.label):
        for step in loader.graph.forwards_plan(key):
            migration = loader.graph.nodes[step]
            with connection.schema_editor(atomic=migration.atomic) as schema_editor:
                state = migration.apply(state, schema_editor)
