"""psql, and roles that may do what ``migrations/grants.sql`` grants them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.database import Database

MIGRATIONS = Path(__file__).parents[2] / "migrations"


def psql(
    database: Database, *arguments: str, user: str = "postgres", script: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run psql, with its own defaults and not those of whoever runs the tests."""
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
    """Run a file of SQL, to its end."""
    done = psql(
        database,
        *(part for name, value in variables.items() for part in ("-v", f"{name}={value}")),
        *("-v", "ON_ERROR_STOP=1", "-f", str(path)),
        user=user,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr  # nothing to grant, for instance


def granted(database: Database, *kinds: str) -> str:
    """A role that is what grants.sql calls ``kinds``, in this database. Its name."""
    role = "_".join(("role", *kinds))
    database.execute(
        f"DO $$ BEGIN CREATE ROLE {role} LOGIN; EXCEPTION WHEN duplicate_object THEN END $$"
    )
    run_file(database, MIGRATIONS / "grants.sql", **dict.fromkeys(kinds, role))
    return role


def as_role(database: Database, role: str) -> str:
    return database.postgres.dsn(database.name, role)


def make_old(database: Database) -> None:
    """Everything in the stream is past the retention now."""
    database.execute(
        "UPDATE pg_eventstream_stream SET sequenced_at = sequenced_at - interval '2 days'"
    )
