"""What a client that stops reading costs the others.

One uvicorn process streams one channel to 100 clients, without a proxy. Their latency, from an
event's commit to its arrival, is measured with another client that has stopped reading and without
it, in turns. In each turn a burst of events fills the sockets' buffers first. At the end that
client reads again: it must get every event, once and in order.

    python -m benchmarks.slow_client [--quick] [--rounds 3]
"""

from __future__ import annotations

import asyncio
import statistics

from . import report
from .report import Comparison, Report, at_most, say
from .servers import OURS, Database, Site, postgres
from .streams import Streams

#: About 18 kB per event. The burst is far larger than the buffers of a connection.
LENGTH, BURST = 200, 600
EVENTS_PER_SECOND = 20


async def measure(site: Site, beside: bool, seconds: float) -> tuple[float, float, float]:
    """p50 and p99 in milliseconds, and the growth of the process in kB."""
    await site.send(0, 1)
    async with Streams(site.port, 100) as others, Streams(site.port, int(beside)) as stopped:
        for stream in stopped.streams:
            stream.transport.pause_reading()
        before = site.memory()
        others.expect(BURST)
        await site.send(1, BURST, LENGTH)
        await others.wait()

        latencies: list[float] = []
        last = BURST + int(seconds * EVENTS_PER_SECOND)
        for n in range(BURST + 1, last + 1):
            others.expect(n)
            (at,) = await site.send(n, 1, LENGTH)
            await asyncio.sleep(1 / EVENTS_PER_SECOND)
            await others.wait()
            latencies += [time - at for stream in others.streams for time in stream.times]
        assert len(latencies) == 100 * (last - BURST), "events were lost"
        grown = site.memory() - before

        stopped.expect(last)
        for stream in stopped.streams:
            assert not stream.numbers
            stream.transport.resume_reading()
        await stopped.wait()
        for stream in stopped.streams:
            assert stream.numbers.tolist() == list(range(1, last + 1)), "it must get everything"
    cuts = statistics.quantiles(latencies, n=100)
    return cuts[49] * 1000, cuts[98] * 1000, grown


def benchmark(options: report.Options) -> Report:
    beside, without = "with a client that stopped reading", "without it"
    p50, p99 = (
        Comparison(f"100 streams: latency, {what}", "ms", beside, without, at_most(1.1))
        for what in ("median", "99th percentile")
    )
    memory = 0.0
    with postgres() as server:
        database = Database(server, OURS)
        for n in range(options.rounds):
            for way in (beside, without) if n % 2 else (without, beside):
                with database.site() as site:
                    figures = asyncio.run(measure(site, way == beside, 4 if options.quick else 10))
                p50.add(way, figures[0])
                p99.add(way, figures[1])
                if way == beside:
                    memory = max(memory, figures[2] / 1000)
                say("slow_client", f"{way}: p50 {figures[0]:.1f} ms, p99 {figures[1]:.1f} ms")
    return Report([p50, p99], {"maximum growth of the process, MB": round(memory, 1)})


if __name__ == "__main__":
    report.main("slow_client", __doc__, benchmark)
