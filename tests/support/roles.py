"""psql, and roles with the rights that ``migrations/grants.sql`` grants them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.database import Database

MIGRATIONS = Path(__file__).parents[2] / "migrations"
MAKE_OLD = "UPDATE pg_eventstream_stream SET sequenced_at = sequenced_at - interval '2 days'"


def psql(
    database: Database, *arguments: str, user: str = "postgres", script: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run psql with its built-in defaults, without the configuration of the current user."""
    return subprocess.run(
        [
            str(database.postgres.program("psql")),
            *("--no-psqlrc", "--quiet", "--no-align", "--tuples-only"),
            *("--dbname", database.postgres.dsn(database.name, user)),
            *arguments,
        ],
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_file(database: Database, path: Path, *, user: str = "postgres", **variables: str) -> None:
    """Run a file of SQL to its end."""
    done = psql(
        database,
        *(part for name, value in variables.items() for part in ("-v", f"{name}={value}")),
        *("-v", "ON_ERROR_STOP=1", "-f", str(path)),
        user=user,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr  # for example, nothing to grant


def granted(database: Database, *kinds: str) -> str:
    """Create a role with the grants of these kinds in grants.sql. Returns its name."""
    role = "_".join(("role", *kinds))
    database.execute(
        f"DO $$ BEGIN CREATE ROLE {role} LOGIN; EXCEPTION WHEN duplicate_object THEN END $$"
    )
    run_file(database, MIGRATIONS / "grants.sql", **dict.fromkeys(kinds, role))
    return role


def as_role(database: Database, role: str) -> str:
    return database.postgres.dsn(database.name, role)


def make_old(database: Database) -> None:
    """Make all events in the stream older than the retention."""
    database.execute(MAKE_OLD)
