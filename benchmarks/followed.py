"""What the number of followed channels costs a process that streams without a proxy.

Its hub reads the stream page by page. In turns, clients follow 100 channels or 50,000, one each.
The 50,000 include the 100. The benchmark measures the time to read a page of 200 events of those
100 channels and to pass it to the event loop, and the time that the loop works per client when all
clients leave at once.

    python -m benchmarks.followed [--quick] [--rounds 3]
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

import psycopg

from . import report
from .backlog import configure
from .report import Comparison, Report, at_most, say
from .servers import OURS, Database, postgres

if TYPE_CHECKING:
    from pg_eventstream.streams.hub import Hub

PAGES, PAGE_EVENTS = 50, 200
FEW, MANY, MANY_IF_QUICK = 100, 50_000, 10_000


class Client:
    """Follows one channel and accepts all that it is offered."""

    def __init__(self, channel: str) -> None:
        self.channels = (channel,)

    def offer(self, news: Any) -> None:
        pass

    def read_again(self) -> None:
        pass


async def measure(session: psycopg.Connection[Any], count: int) -> tuple[float, float]:
    """Milliseconds per page, and microseconds of the loop per client that leaves."""
    from pg_eventstream.streams.hub import Hub

    hub = Hub("default")
    clients = [Client(f"channel-{n}") for n in range(count)]
    for client in clients:
        hub.add(client)
    page = await asyncio.to_thread(read_pages, hub, session)
    start = time.perf_counter()
    for client in clients:
        hub.discard(client)
    left = time.perf_counter() - start
    return page * 1000, left / count * 1e6


def read_pages(hub: Hub, session: psycopg.Connection[Any]) -> float:
    """Seconds per page, read as the hub's thread does."""
    from pg_eventstream.streams.hub import _Reader

    # Instead of the thread, which waits for events.
    assert hub._reader
    hub._reader.stop()
    hub._reader.join()
    reader = hub._reader = _Reader(hub)
    seconds = []
    for _ in range(PAGES):
        reader.position = 0
        start = time.perf_counter()
        assert reader._read_page(session) == PAGE_EVENTS
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def benchmark(options: report.Options) -> Report:
    many = MANY_IF_QUICK if options.quick else MANY
    names = {FEW: f"{FEW} channels", many: f"{many:,} channels"}
    page, leave = (
        Comparison(f"{names[many]} followed: {what}", unit, names[many], names[FEW], at_most(2))
        for what, unit in (
            ("a page of 200 events", "ms"),
            ("all clients leave, per client", "µs"),
        )
    )
    with postgres() as server:
        database = Database(server, OURS)
        os.environ.update(database.environment)
        configure()
        with database.connect() as session:
            session.execute(
                "INSERT INTO pg_eventstream_event (channel, data)"
                " SELECT 'channel-' || n %% 100, repeat('a line of a chat, ', 5)"
                " FROM generate_series(1, %s) AS n",
                [PAGE_EVENTS],
            )
            session.execute("SELECT pg_eventstream_sequence()")
            for n in range(options.rounds):
                for count in (FEW, many) if n % 2 else (many, FEW):
                    figures = asyncio.run(measure(session, count))
                    for comparison, figure in zip((page, leave), figures, strict=True):
                        comparison.add(names[count], figure)
                    say(
                        "followed",
                        f"round {n + 1}, {names[count]}: {figures[0]:.2f} ms per page,"
                        f" {figures[1]:.2f} µs per client that leaves",
                    )
    return Report([page, leave])


if __name__ == "__main__":
    report.main("followed", __doc__, benchmark)
