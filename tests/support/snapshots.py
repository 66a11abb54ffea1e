"""Transactions that only read."""

from __future__ import annotations

import psycopg


def only_hold_a_snapshot(connection: psycopg.Connection[object], channel: str) -> None:
    """Hold a snapshot, as pg_dump does for hours."""
    connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    connection.execute("SELECT count(*) FROM pg_eventstream_event")
