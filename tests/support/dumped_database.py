"""Copies of a database by pg_dump."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psycopg

from pg_eventstream.servers.postgres import Postgres
from tests.support.database import Database


def dump(database: Database, path: Path, *arguments: str) -> None:
    subprocess.run(
        [
            *(str(database.postgres.program("pg_dump")), "--format=custom", f"--file={path}"),
            *(*arguments, database.dsn),
        ],
        check=True,
        timeout=60,
    )


def restore(path: Path, cluster: Postgres, name: str, *arguments: str) -> Database:
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    database = Database(cluster, name)
    subprocess.run(
        [
            *(str(cluster.program("pg_restore")), "--exit-on-error", "--jobs=2"),
            *(*arguments, f"--dbname={database.dsn}", str(path)),
        ],
        check=True,
        timeout=60,
    )
    return database
