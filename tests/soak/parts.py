"""The processes of a soak, and their faults."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import Process, accepts, free_port
from pg_eventstream.servers.pushpin import Pushpin
from tests.soak import figures
from tests.support.database import Database
from tests.support.environment import DIRECTORY, KEY, child_environment
from tests.support.publisher import PublisherProcess
from tests.support.sse_client import SSEClient


class Parts:
    """PostgreSQL, Pushpin, two application servers, a publisher and its standby."""

    def __init__(self, retention: float, stack: ExitStack) -> None:
        self._stack = stack
        # Vacuum runs more often, because the days are shorter.
        self.postgres = stack.enter_context(
            Postgres(DIRECTORY / "postgres", settings={"autovacuum_naptime": "5s"})
        )
        DIRECTORY.chmod(0o755)
        self.database = _migrated(self.postgres)
        ports = free_port(), free_port()
        self.pushpin = stack.enter_context(
            Pushpin(
                DIRECTORY / "pushpin",
                origin=f"127.0.0.1:{ports[0]}",
                sig_key=KEY,
                program=os.environ.get("PG_EVENTSTREAM_TEST_PUSHPIN", "pushpin"),
            )
        )
        settings = json.dumps({"EVENTSTREAM_RETENTION": retention})
        self._environment = child_environment(self.pushpin, PG_EVENTSTREAM_TEST_SETTINGS=settings)
        self.servers = [self._serve(port) for port in ports]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.publishers: list[PublisherProcess] = []
        self._made = 0
        self.add_publisher().wait_for_log(": leading")
        self.add_publisher().wait_for_log("standing by")

    def _serve(self, port: int) -> Process:
        server = Process(
            f"the application server at {port}",
            [
                *(sys.executable, "-m", "uvicorn", "tests.project.asgi:application"),
                *(f"--port={port}", "--log-level=warning"),
            ],
            log_path=DIRECTORY / f"server-{port}.log",
            environment=self._environment,
        )
        server.start(ready=lambda: accepts(port))
        self._stack.callback(server.kill)
        return server

    def add_publisher(self) -> PublisherProcess:
        self._made += 1
        publisher = PublisherProcess(DIRECTORY / f"publisher-{self._made}.log", self._environment)
        self._stack.callback(publisher.kill)
        publisher.start()
        self.publishers.append(publisher)
        return publisher

    def leader(self) -> PublisherProcess | None:
        rows = self.database.fetch("SELECT name FROM pg_eventstream_publisher")
        pids = [int(row[0].rpartition(":")[2]) for row in rows]
        return next((p for p in self.publishers if p.running and p.pid in pids), None)

    def pruned(self) -> int:
        """The number of pruned events."""
        return int(
            self.database.value(
                "SELECT coalesce(max(position), 0) - (SELECT count(*) FROM pg_eventstream_stream)"
                "  FROM pg_eventstream_cursor"
            )
        )

    def figures(self) -> dict[str, float]:
        leader = self.leader()
        return {
            **(figures.of_process("leader", leader.pid) if leader else {}),
            **figures.of_process("server 1", self.servers[0].pid),
            **figures.of_process("server 2", self.servers[1].pid),
            **figures.of_children("PostgreSQL", self.postgres.pid),
            **figures.of_children("Pushpin", self.pushpin.pid),
            **figures.of_database(self.database),
        }


def _migrated(postgres: Postgres) -> Database:
    """The database, which Django uses from now on."""
    os.environ["PG_EVENTSTREAM_TEST_DSN"] = postgres.dsn()
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.project.settings"

    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", run_syncdb=True, verbosity=0)
    return Database(postgres, "postgres")


class Faults:
    """Small faults at random moments: `now_and_then` causes those that are due."""

    def __init__(
        self, seconds: float, seed: int, parts: Parts, clients: Sequence[SSEClient]
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._parts, self._clients = parts, clients
        self._chance = random.Random(seed)
        self._start = time.monotonic()
        short = seconds < 100  # has one kill, when there is something to prune
        self._kinds: dict[str, tuple[Callable[[], None], float]] = {
            "clients dropped": (self._drop, min(2.0, seconds / 10)),
            "backends terminated": (self._terminate, min(20.0, seconds / 4)),
            "publishers killed": (self._kill, 0.6 * seconds if short else 60.0),
        }
        self._due = {name: every for name, (_, every) in self._kinds.items()}

    def now_and_then(self) -> None:
        now = time.monotonic() - self._start
        for name, (do, every) in self._kinds.items():
            if now >= self._due[name]:
                do()
                self._due[name] = now + every * self._chance.uniform(0.7, 1.3)
                self.counts[name] += 1

    def _drop(self) -> None:
        self._chance.choice(self._clients).drop()

    def _terminate(self) -> None:
        """End one session of any part: the leader's, a feed's, a hub's …"""
        ours = "FROM pg_stat_activity WHERE application_name LIKE 'pg\\_eventstream %' ORDER BY pid"
        pids = [row[0] for row in self._parts.database.fetch(f"SELECT pid {ours}")]
        if pids:
            self._parts.database.execute(
                "SELECT pg_terminate_backend(%s)", [self._chance.choice(pids)]
            )

    def _kill(self) -> None:
        leader = self._parts.leader()
        if leader is not None:
            leader.kill()
        self._parts.add_publisher()
