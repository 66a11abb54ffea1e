"""Placement of the tables: the router and the migrations decide without a server."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from django.test import override_settings

import pg_eventstream
from pg_eventstream.models import Event
from pg_eventstream.router import EventStreamRouter
from pg_eventstream.tables import placement

MIGRATIONS = sorted(
    path.stem for path in Path(pg_eventstream.__file__).parent.glob("migrations/[0-9]*.py")
)


def test_our_router_decides_for_our_app_alone() -> None:
    router = EventStreamRouter()
    user, event = import_module("django.contrib.auth.models").User, Event
    with override_settings(EVENTSTREAM_DATABASE="events"):
        assert [router.db_for_read(event), router.db_for_write(event)] == ["events", "events"]
        assert [router.db_for_read(user), router.db_for_write(user)] == [None, None]
        assert router.allow_migrate("events", "auth", model_name="user") is None
        assert router.allow_migrate("default", "auth") is None


@pytest.mark.parametrize("name", MIGRATIONS)
def test_every_migration_refuses_to_run_where_it_cannot_work(name: str) -> None:
    module = import_module(f"pg_eventstream.migrations.{name}")
    assert issubclass(module.Migration, placement.Migration)
