"""Real servers for a benchmark: PostgreSQL, Pushpin, the publisher, and a small site."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import HOST, Process, accepts, free_port, wait_until
from pg_eventstream.servers.pushpin import Pushpin

OURS, PEER, PUBSUB = "pg_eventstream", "django_eventstream", "pgpubsub"
# Without a comma, which would make it a list in pushpin.conf, and without characters to quote in a
# URL.
SIG_KEY = "a-key-for-benchmarks-only-long-enough-for-HS256"


@contextmanager
def postgres(**settings: str) -> Iterator[Postgres]:
    """A server with default settings except for these. Its directory is also used for logs."""
    with (
        tempfile.TemporaryDirectory(prefix="pg_eventstream-", dir="/tmp") as directory,
        Postgres(Path(directory), settings={"max_connections": "200", **settings}) as server,
    ):
        Path(directory).chmod(0o755)
        yield server


class Database:
    """A migrated database of the benchmarks' project, built with ``package``.

    ``settings`` are Django settings by name.
    """

    def __init__(self, server: Postgres, name: str, package: str = OURS, **settings: Any) -> None:
        self.name = name
        self.dsn = server.dsn(name)
        self.server = server
        self.environment = {
            **os.environ,
            "BENCHMARK_PACKAGE": package,
            "BENCHMARK_SETTINGS": json.dumps(settings),
            "DJANGO_SETTINGS_MODULE": "benchmarks.project.settings",
            "PGDATABASE": name,
            "PGUSER": "postgres",
            "PGHOST": server.host,
            "PGPORT": str(server.port),
        }
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        self.manage("migrate", "--run-syncdb", "--verbosity=0")

    def manage(self, *arguments: str) -> None:
        """Run a management command until it ends."""
        subprocess.run(
            [sys.executable, "-m", "django", *arguments], env=self.environment, check=True
        )

    def connect(self, **kwargs: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn, **{"autocommit": True, **kwargs})

    def value(self, query: str, params: Any = None) -> Any:
        with self.connect() as connection:
            row = connection.execute(query, params).fetchone()
        assert row
        return row[0]

    def process(self, name: str, *arguments: str, **environment: str) -> Process:
        """A Python process that uses this database. The arguments are those of ``python``."""
        return Process(
            name,
            [sys.executable, *arguments],
            log_path=self.server.directory / f"{name}-{self.name}.log",
            environment={**self.environment, **environment},
        )

    @contextmanager
    def publisher(self) -> Iterator[Process]:
        """A publisher that leads."""
        process = self.process("publisher", "-m", "django", "eventstream_publisher")
        log = process.log_path
        assert log is not None
        start = log.stat().st_size if log.exists() else 0
        process.start()
        try:
            wait_until(lambda: ": leading" in log.read_text()[start:], timeout=20)
            yield process
        finally:
            process.stop()

    @contextmanager
    def site(self, port: int | None = None) -> Iterator[Site]:
        """The project, served by one uvicorn process."""
        port = port or free_port()
        process = self.process(
            "uvicorn",
            *("-m", "uvicorn", "benchmarks.project.asgi:application"),
            *("--port", str(port), "--log-level", "warning"),
        )
        process.start(ready=lambda: accepts(port))
        try:
            yield Site(process, port)
        finally:
            process.kill()


class Site:
    """The project's server."""

    def __init__(self, process: Process, port: int) -> None:
        self.process = process
        self.port = port

    async def send(self, first: int, count: int, length: int = 1) -> list[float]:
        """Send events of about 90 times ``length`` characters, one per transaction.

        Returns the time of each commit, by the clock that all processes share (`time.monotonic`).
        """
        reader, writer = await asyncio.open_connection(HOST, self.port)
        target = f"/send/?first={first}&count={count}&length={length}"
        writer.write(f"GET {target} HTTP/1.0\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b" 200 " in head.partition(b"\r\n")[0], answer
        times: list[float] = json.loads(body)["committed"]
        assert len(times) == count
        return times

    def memory(self) -> int:
        """The private memory of the process, in kB."""
        rollup = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return sum(int(line.split()[1]) for line in rollup.splitlines() if "Private" in line)


@contextmanager
def pushpin(directory: Path, origin_port: int) -> Iterator[Pushpin]:
    """A Pushpin in front of a site."""
    with Pushpin(directory, sig_key=SIG_KEY, origin=f"{HOST}:{origin_port}") as server:
        yield server
