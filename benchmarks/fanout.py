"""What one process streams to many clients: deliveries per second, and latency.

One uvicorn process streams one channel to 100 and to 1,000 clients, without a proxy, first
built with pg_eventstream and then with django-eventstream (its ASGI mode, events stored in
the same PostgreSQL), in turns. Each event is committed on its own by a view of that process.

    burst     events are sent as fast as the view can; deliveries per second from the first
              commit until the last client has the last event
    latency   events are sent at a rate that both can keep up with; from an event's commit to
              its arrival at a client, over all clients

    python -m benchmarks.fanout [--rounds 5] [--streams 100 1000] [--quick]

Needs ``pip install 'pg-eventstream[bench]'``.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pg_eventstream.demo.postgres import Postgres

from .site import OURS, PEER, Site, print_versions
from .streams import Streams

BURST_DELIVERIES = 100_000
#: Deliveries per second while latency is measured.
STEADY_DELIVERIES = 1_000


@dataclass(frozen=True, slots=True)
class Figures:
    deliveries_per_second: float
    p50: float  # milliseconds
    p99: float
    lost: int
    repeated: int
    disordered: int
    connections: int  # to PostgreSQL
    memory: float  # kB of the server per stream


async def measure(site: Site, count: int, seconds: float) -> Figures:
    await site.send(0, 1)  # all that is loaded late
    before = site.memory()
    async with Streams(site.port, count) as streams:
        memory = (site.memory() - before) / count

        events = BURST_DELIVERIES // count
        streams.expect(events)
        committed = await site.send(1, events)
        await streams.wait()
        lost = repeated = disordered = 0
        for stream in streams.streams:
            numbers = stream.numbers.tolist()
            lost += events - len(set(numbers))
            repeated += len(numbers) - len(set(numbers))
            disordered += numbers != sorted(numbers)
        rate = (count * events - lost) / (streams.last_time - committed[0])

        latencies: list[float] = []
        pause = count / STEADY_DELIVERIES
        for n in range(events + 1, events + 1 + max(int(seconds / pause), 5)):
            streams.expect(n)
            (at,) = await site.send(n, 1)
            await asyncio.sleep(pause)
            await streams.wait()
            for stream in streams.streams:
                lost += n not in stream.numbers
                latencies += [time - at for time in stream.times]
        connections = site.connections()
    cuts = statistics.quantiles(latencies, n=100)
    return Figures(
        rate, cuts[49] * 1000, cuts[98] * 1000, lost, repeated, disordered, connections, memory
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--seconds", type=float, default=10, help="of steady sending, per round")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 3 seconds")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 2, 3.0
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        # The peer holds a connection for each stream.
        settings = {"max_connections": str(max(options.streams) + 100)}
        postgres = stack.enter_context(Postgres(directory / "postgres", settings=settings))
        sites = [Site(package, postgres, directory) for package in (OURS, PEER)]
        for site in sites:
            site.migrate()
        print_versions()
        for count in options.streams:
            report(count, [one_round(sites, count, options) for _ in range(options.rounds)])


def one_round(
    sites: list[Site], count: int, options: argparse.Namespace
) -> tuple[Figures, Figures]:
    figures = []
    for site in sites:
        with site:
            figures.append(asyncio.run(measure(site, count, options.seconds)))
        f = figures[-1]
        print(
            f"{count:5} streams  {site.package:19} {f.deliveries_per_second:9.0f}/s"
            f"  p50 {f.p50:7.1f} ms  p99 {f.p99:7.1f} ms"
            f"  lost {f.lost}, repeated {f.repeated}, streams out of order {f.disordered},"
            f" {f.connections} connections, {f.memory:.0f} kB a stream",
            flush=True,
        )
    return figures[0], figures[1]


def report(count: int, rounds: list[tuple[Figures, Figures]]) -> None:
    print(f"{count:5} streams, medians of {len(rounds)} rounds' ratios to django-eventstream")
    for what in ("deliveries_per_second", "p50", "p99"):
        ratios = [getattr(ours, what) / getattr(peer, what) for ours, peer in rounds]
        middle = statistics.median(ratios)
        print(f"    {what:22} {middle:6.2f}  ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
