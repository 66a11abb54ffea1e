"""Queries that only look. Their plans do not depend on statistics, which can be old."""

from __future__ import annotations

from typing import Any

import psycopg

# With statistics from before a burst, the planner would read and sort whole tables.
_SET_UP = """
    SET LOCAL enable_seqscan = off;
    SET LOCAL enable_bitmapscan = off;
    SET LOCAL enable_sort = off;
    SET LOCAL enable_hashagg = on;
    SET LOCAL jit = off
"""
# What a role may not see, and what is missing before all migrations are applied.
_UNKNOWN = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedFunction,
)


def fetch(
    connection: psycopg.Connection[Any], query: str, params: Any = None
) -> list[tuple[Any, ...]] | None:
    """The rows of a query; None if this role may not see them, or if the tables are missing.

    Raises `psycopg.Error` for all other reasons.
    """
    try:
        with connection.transaction():
            connection.execute(_SET_UP)
            return connection.execute(query, params).fetchall()
    except _UNKNOWN:
        return None
