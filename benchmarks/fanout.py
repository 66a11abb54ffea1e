"""What one process streams to many clients: deliveries per second, and latency.

One uvicorn process streams one channel to 100 and to 1,000 clients, without a proxy. It runs
pg_eventstream and django-eventstream (in its ASGI mode, with events stored in the same PostgreSQL)
in turns. A view of that process commits each event in a separate transaction.

    burst     events are sent as fast as the view can; deliveries per second from the first
              commit until the last client has the last event
    latency   events are sent at a rate that both can sustain; the time from an event's commit to
              its arrival at a client, over all clients

    python -m benchmarks.fanout [--quick] [--rounds 3]
"""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter

from . import report
from .report import Comparison, Report, at_least, at_most, say
from .servers import OURS, PEER, Database, Site, postgres
from .streams import Streams

BURST_DELIVERIES = 100_000
#: Deliveries per second while latency is measured.
STEADY_DELIVERIES = 1_000


def benchmark(options: report.Options) -> Report:
    found = Report([])
    faults: Counter[str] = Counter()
    # The peer holds a connection for each stream.
    with postgres(max_connections="1200") as server:
        databases = [Database(server, package, package) for package in (OURS, PEER)]
        for count in (100, 1000):
            rate, p50, p99 = (
                Comparison(f"{count} streams: {what}", unit, OURS, PEER, goal)
                for what, unit, goal in (
                    ("events sent at once", "deliveries/s", at_least(3)),
                    ("latency, median", "ms", None),
                    ("latency, 99th percentile", "ms", at_most(1)),
                )
            )
            found.comparisons += [rate, p50, p99]
            for n in range(options.rounds):
                for database in databases:
                    with database.site() as site:
                        measured = asyncio.run(
                            measure(site, database, count, 3 if options.quick else 10, faults)
                        )
                        connections, memory = measured[3:]
                    for comparison, figure in zip((rate, p50, p99), measured, strict=False):
                        comparison.add(database.name, figure)
                    say(
                        "fanout",
                        f"{count} streams, round {n + 1}, {database.name}: {measured[0]:,.0f}/s,"
                        f" p50 {measured[1]:.1f} ms, p99 {measured[2]:.1f} ms",
                    )
                    found.facts[f"{count} streams, {database.name}: connections"] = connections
                    found.facts[f"{count} streams, {database.name}: kB per stream"] = round(memory)
    for name in (OURS, PEER):
        for fault in ("lost", "repeated"):
            found.facts[f"{name}: deliveries {fault}"] = faults[f"{name} {fault}"]
    return found


async def measure(
    site: Site, database: Database, count: int, seconds: float, faults: Counter[str]
) -> tuple[float, float, float, int, float]:
    """Deliveries per second; p50 and p99 in ms; connections; kB per stream."""
    name = database.name
    await site.send(0, 1)  # loads everything that is loaded lazily
    before = site.memory()
    async with Streams(site.port, count) as streams:
        memory = (site.memory() - before) / count

        events = BURST_DELIVERIES // count
        streams.expect(events)
        committed = await site.send(1, events)
        await streams.wait()
        delivered = 0
        for stream in streams.streams:
            numbers = stream.numbers.tolist()
            different = len(set(numbers))
            delivered += different
            faults[f"{name} lost"] += events - different
            faults[f"{name} repeated"] += len(numbers) - different
            if name == OURS:
                assert numbers == list(range(1, events + 1)), "an event is missing or out of order"
        rate = delivered / (streams.last_time - committed[0])

        latencies: list[float] = []
        pause = count / STEADY_DELIVERIES
        for n in range(events + 1, events + 1 + max(int(seconds / pause), 5)):
            streams.expect(n)
            (at,) = await site.send(n, 1)
            await asyncio.sleep(pause)
            await streams.wait()
            for stream in streams.streams:
                faults[f"{name} lost"] += n not in stream.numbers
                latencies += [time - at for time in stream.times]
        connections = database.value(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    cuts = statistics.quantiles(latencies, n=100)
    return rate, cuts[49] * 1000, cuts[98] * 1000, connections, memory


if __name__ == "__main__":
    report.main("fanout", __doc__, benchmark)
