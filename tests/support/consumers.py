"""Consumers in processes, and what they have handled."""

from __future__ import annotations

import json
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pg_eventstream.consumers import Consumer, consumer
from pg_eventstream.consumers.worker import Worker
from pg_eventstream.limits import LIMITS, Limits
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database
from tests.support.environment import DIRECTORY, child_environment
from tests.support.forked import ForkedProcess
from tests.support.handlers import TABLE, named, record


def recorder(name: str, **options: Any) -> Consumer:
    """A consumer that records each event, beginning with the earliest."""
    return consumer(name, **{"start": "earliest", **options})(named(record, name))


def declared(*consumers: dict[str, Any]) -> dict[str, str]:
    """The environment of a process whose code declares these consumers.

    Each is the arguments of ``consumer()`` and the name of a ``handler`` of `handlers`.
    """
    return {"PG_EVENTSTREAM_TEST_CONSUMERS": json.dumps(consumers)}


class ConsumerProcess(ForkedProcess):
    """``manage.py eventstream_consumers run`` in a separate process."""

    count = 0

    def __init__(self, *arguments: str, environment: dict[str, str]) -> None:
        ConsumerProcess.count += 1
        self.log_file = DIRECTORY / f"consumers-{ConsumerProcess.count}.log"
        super().__init__(
            "the consumers",
            [sys.executable, "-m", "django", "eventstream_consumers", "run", *arguments],
            log_path=self.log_file,
            environment={**child_environment(), **environment},
        )

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def wait_for_log(self, text: str, timeout: float = 30) -> None:
        try:
            wait_until(lambda: text in self.log or not self.running, timeout=timeout)
        except TimeoutError:
            raise self.error(f"did not say {text!r}") from None
        assert text in self.log, self.error(f"did not say {text!r}")

    def __enter__(self) -> ConsumerProcess:
        return self.begin()

    def __exit__(self, *_: object) -> None:
        self.stop(timeout=30)

    def begin(self) -> ConsumerProcess:
        """Start, and wait until it runs."""
        self.start()
        self.wait_for_log(": running")
        return self


class Handled:
    """What was handled, in the table that handlers write to."""

    def __init__(self, database: Database) -> None:
        self._database = database
        database.execute(TABLE)

    def count(self, consumer: str) -> int:
        return int(
            self._database.value("SELECT count(*) FROM handled WHERE consumer = %s", [consumer])
        )

    def wait(self, consumer: str, count: int, timeout: float = 20) -> None:
        """Wait until so many events are handled."""
        try:
            wait_until(lambda: self.count(consumer) >= count, timeout=timeout)
        except TimeoutError:
            raise AssertionError(
                f"{self.count(consumer)} of {count} events handled after {timeout:g} s:"
                f" {self._database.fetch('SELECT * FROM pg_eventstream_slot ORDER BY 1, 2')}"
            ) from None

    def eids(self, consumer: str) -> dict[str, list[int]]:
        """The numbers of the handled events by channel, in the order of handling."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        for channel, eid in self._database.fetch(
            "SELECT channel, eid FROM handled WHERE consumer = %s ORDER BY nth", [consumer]
        ):
            found[channel].append(eid)
        return dict(found)


@contextmanager
def running_worker(*consumers: Consumer, limits: Limits = LIMITS) -> Iterator[Worker]:
    """Run consumers on threads of this process until the end of the block."""
    worker = Worker(consumers, "default", Connector("default", limits=limits))
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(30)
        assert not thread.is_alive()


def handle_all(*consumers: Consumer) -> int:
    """Handle what is committed by now, in this process. Failures count."""
    return Worker(consumers, "default").run_once()
