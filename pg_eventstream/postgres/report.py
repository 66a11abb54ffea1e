"""What processes say about themselves, for people and for monitoring: see `models.Report`."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from typing import Any

import psycopg

from .connector import explain

logger = logging.getLogger(__name__)

#: The names of the reports.
PUBLISHER, PRUNER, DOCTOR = "publisher", "pruner", "doctor"


def consumer_report(consumer_id: int) -> str:
    """The name of the report about a handler that works for long."""
    return f"consumer {consumer_id}"


def write_report(connection: psycopg.Connection[Any], name: str, content: dict[str, Any]) -> None:
    """Replace the report. A role that may not write it logs that, and continues.

    ``connection`` must be in autocommit mode, outside a transaction.
    """
    try:
        connection.execute(
            """
            INSERT INTO pg_eventstream_report (name, content) VALUES (%(name)s, %(content)s)
            ON CONFLICT (name) DO UPDATE SET at = statement_timestamp(), content = excluded.content
            """,
            {"name": name, "content": json.dumps(content)},
        )
    except psycopg.errors.InsufficientPrivilege as e:
        logger.info(
            "report of the %s not written: %s",
            name,
            explain(e),
            extra={"event": "report-not-written", "report": name},
        )


def own_version() -> str:
    """The version of this package; "unknown" if it runs without being installed."""
    try:
        return importlib.metadata.version("pg-eventstream")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
