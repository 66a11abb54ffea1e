"""Senders that run until they are stopped, and a check of what clients received."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from tests.support.database import Database
from tests.support.environment import THOROUGH
from tests.support.sse_client import SSEClient


@dataclass
class Load:
    """Concurrent senders on one channel; one transaction in ten is rolled back.

    With ``persistent``, senders that lose their connection open another one and continue. The
    database is asked whether the transaction in progress was committed (`unknown`).
    """

    database: Database
    channel: str
    senders: int = 4
    pause: float = 0.004 if THOROUGH else 0.01
    """How long each sender waits before a transaction, in seconds."""
    seed: int = 0
    length: int = 0
    """The minimum length of an event's data."""
    committed: list[str] = field(default_factory=list)
    rolled_back: list[str] = field(default_factory=list)
    persistent: bool = False
    unknown: set[str] = field(default_factory=set)

    @contextmanager
    def running(self) -> Iterator[None]:
        stopping = threading.Event()
        failures: list[BaseException] = []

        def send(number: int) -> None:
            try:
                self._send(number, stopping)
            except BaseException as e:
                failures.append(e)
                raise

        threads = [threading.Thread(target=send, args=[number]) for number in range(self.senders)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
        assert not failures

    def _send(self, number: int, stopping: threading.Event) -> None:
        chance = random.Random(f"{self.seed} {number}")
        numbers = itertools.count()
        while not stopping.is_set():
            try:
                with self.database.connect(autocommit=False) as connection:
                    self._send_over(connection, number, numbers, chance, stopping)
            except psycopg.OperationalError:
                if not self.persistent:
                    raise
                stopping.wait(0.1)

    def _send_over(
        self,
        connection: psycopg.Connection[Any],
        number: int,
        numbers: Iterator[int],
        chance: random.Random,
        stopping: threading.Event,
    ) -> None:
        while not stopping.wait(self.pause):
            n = next(numbers)
            batch = [
                f"{number}-{n}-{part}-".ljust(self.length, "x")
                for part in range(chance.choice([1, 1, 1, 3]))
            ]
            for data in batch:
                connection.execute(
                    "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s)",
                    [self.channel, data],
                )
            if chance.random() < 0.1:
                connection.rollback()
                self.rolled_back += batch
                continue
            try:
                connection.commit()
            except psycopg.OperationalError:
                self.unknown.update(batch)
                raise
            self.committed += batch

    def wait_delivered(self, *clients: SSEClient) -> None:
        """Wait until the clients have all events that are committed now, and one more."""
        count = len(self.committed)
        for client in clients:
            client.wait_count(count + 1, timeout=60)

    def settle(self) -> None:
        """Ask the database whether the transactions in `unknown` were committed."""
        there = self.database.fetch(
            "SELECT data FROM pg_eventstream_event WHERE channel = %s AND data = ANY(%s)",
            [self.channel, list(self.unknown)],
        )
        self.committed += [data for (data,) in there]

    def check(self, client: SSEClient, timeout: float = 60) -> None:
        """Assert that the client has each committed event once, in order, and nothing else."""
        assert len(self.committed) > 0
        deadline = time.monotonic() + timeout
        client.wait_count(len(self.committed), timeout)
        eids = [event.eids[self.channel] for event in client.events]
        assert eids == list(range(1, len(self.committed) + 1))
        data = [event.data for event in client.events]
        assert sorted(data) == sorted(self.committed)
        for number in range(self.senders):
            # A connection that was lost can commit later than the next one.
            own, sent = (
                [e for e in events if e.startswith(f"{number}-") and e not in self.unknown]
                for events in (data, self.committed)
            )
            assert own == sent
        assert time.monotonic() < deadline


@contextmanager
def two_clients(
    url: str, channel: str, *, patience: float = 60
) -> Iterator[tuple[SSEClient, SSEClient]]:
    """Two clients that reconnect when their stream ends. The test can drop the second."""
    with (
        SSEClient(f"{url}/events/", [channel], reconnect=True, patience=patience) as steady,
        SSEClient(f"{url}/events/", [channel], reconnect=True, patience=patience) as restless,
    ):
        yield steady.wait_open(), restless.wait_open()
