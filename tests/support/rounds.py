"""One round of a publisher, run in this process."""

from __future__ import annotations

from datetime import timedelta
from io import StringIO

from django.core.management import call_command
from django.test import override_settings

from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher
from tests.support.database import Database


def publish_once() -> int:
    """Run a whole round: sequence, publish, prune."""
    return Publisher(Connector("default")).run_once()


def sequence(database: Database) -> None:
    """Sequence, as the publisher does first."""
    database.value("SELECT pg_eventstream_sequence()")


def prune() -> None:
    """Prune all sequenced events, as if they were older than the retention."""
    with override_settings(EVENTSTREAM_RETENTION=timedelta(microseconds=1), GRIP_URL=None):
        call_command("eventstream_prune", stdout=StringIO())
