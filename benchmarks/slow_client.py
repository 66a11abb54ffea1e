"""What a client that stops reading costs the others.

One uvicorn process streams one channel to 100 clients, without a proxy. Their latency, from
an event's commit to its arrival, is measured beside another client that stopped reading, and
without it, in turns. In each turn a burst of events fills the sockets' buffers first.
In the end that client reads on: it must get every event, once and in order.

    python -m benchmarks.slow_client [--rounds 5] [--seconds 10]

Needs ``pip install 'pg-eventstream[bench]'``.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from pg_eventstream.demo.postgres import Postgres

from .site import OURS, Site, print_versions
from .streams import Streams

#: About 18 kB an event; the burst is far more than what the buffers of a connection hold.
LENGTH, BURST = 200, 1000
EVENTS_PER_SECOND = 20


async def measure(site: Site, beside: bool, seconds: float) -> tuple[float, float, float]:
    """p50 and p99 in milliseconds, and how many kB the process grew by."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="of steady sending, per turn")
    options = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        postgres = stack.enter_context(Postgres(directory / "postgres"))
        site = Site(OURS, postgres, directory)
        site.migrate()
        print_versions()
        ratios: list[tuple[float, float]] = []
        for n in range(options.rounds):
            figures = {}
            for beside in (False, True) if n % 2 else (True, False):
                with site:
                    p50, p99, grown = asyncio.run(measure(site, beside, options.seconds))
                figures[beside] = p50, p99
                print(
                    f"{'beside a stopped client' if beside else 'without one':24}"
                    f" p50 {p50:6.1f} ms  p99 {p99:6.1f} ms, {grown / 1000:.1f} MB more",
                    flush=True,
                )
            ratios.append(
                (figures[True][0] / figures[False][0], figures[True][1] / figures[False][1])
            )
        print(f"100 streams, medians of {options.rounds} ratios, beside it to without it")
        for name, values in zip(("p50", "p99"), zip(*ratios, strict=True), strict=True):
            print(
                f"    {name} {statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
            )


if __name__ == "__main__":
    main()
