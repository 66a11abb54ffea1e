"""For ``DATABASE_ROUTERS``, where the events have a database of their own."""

from __future__ import annotations

from typing import Any

from django.db.models import Model

from .conf import conf

__all__ = ["EventStreamRouter"]

_LABEL = "pg_eventstream"


class EventStreamRouter:
    """Keeps our tables in ``EVENTSTREAM_DATABASE``, and out of all others.

    Name it before routers that decide for all apps. It says nothing of other apps.
    """

    def db_for_read(self, model: type[Model], **hints: Any) -> str | None:
        return conf.database_alias if model._meta.app_label == _LABEL else None

    db_for_write = db_for_read

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return db == conf.database_alias if app_label == _LABEL else None
