"""A database router for projects that keep the events in a separate database."""

from __future__ import annotations

from typing import Any

from django.db.models import Model

from .conf import conf

__all__ = ["EventStreamRouter"]

_LABEL = "pg_eventstream"


class EventStreamRouter:
    """Keeps the tables of this package in ``EVENTSTREAM_DATABASE`` and out of all others.

    List it in ``DATABASE_ROUTERS`` before routers that decide for all apps. It has no opinion on
    other apps.
    """

    def db_for_read(self, model: type[Model], **hints: Any) -> str | None:
        return conf.database_alias if model._meta.app_label == _LABEL else None

    db_for_write = db_for_read

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return db == conf.database_alias if app_label == _LABEL else None
