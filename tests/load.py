"""Senders that go on until told to stop, and the check of what clients made of it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .conftest import Database
from .sse_client import SSEClient


@dataclass
class Load:
    """Concurrent senders on one channel; one transaction in ten is rolled back."""

    database: Database
    channel: str
    senders: int = 4
    pause: float = 0.004
    seed: int = 0
    length: int = 0
    """The least length of an event's data."""
    committed: list[str] = field(default_factory=list)
    rolled_back: list[str] = field(default_factory=list)

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
        with self.database.connect(autocommit=False) as connection:
            for n in range(1_000_000):
                if stopping.wait(self.pause):
                    return
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
                else:
                    connection.commit()
                    self.committed += batch

    def check(self, client: SSEClient, timeout: float = 60) -> None:
        """The client has every committed event exactly once, in order, and nothing else."""
        assert len(self.committed) > 0
        deadline = time.monotonic() + timeout
        client.wait_count(len(self.committed), timeout)
        eids = [event.eids[self.channel] for event in client.events]
        assert eids == list(range(1, len(self.committed) + 1))
        data = [event.data for event in client.events]
        assert sorted(data) == sorted(self.committed)
        for number in range(self.senders):
            own = [event for event in data if event.startswith(f"{number}-")]
            assert own == [event for event in self.committed if event.startswith(f"{number}-")]
        assert time.monotonic() < deadline


@contextmanager
def two_clients(
    url: str, channel: str, *, patience: float = 60
) -> Iterator[tuple[SSEClient, SSEClient]]:
    """Clients that come back when their stream has ended; the second is for the test to drop."""
    with (
        SSEClient(f"{url}/events/", [channel], reconnect=True, patience=patience) as steady,
        SSEClient(f"{url}/events/", [channel], reconnect=True, patience=patience) as restless,
    ):
        yield steady.wait_open(), restless.wait_open()
