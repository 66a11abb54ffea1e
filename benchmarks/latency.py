"""From an event's commit to its arrival at a client behind Pushpin, in milliseconds.

At 1, 100 and 1,000 events per second, in the same run, each with a separate database and Pushpin:

    pg_eventstream      its publisher
    floor               `floor.py`: NOTIFY with the payload and a bare LISTEN loop that POSTs
    django_eventstream  its send_event with stored events, which POSTs in the sender's process

The sender (`paced_sender.py`) is a separate process that commits one event per transaction. At one
event per second the three take turns a third of a second apart, otherwise slice by slice.

    python -m benchmarks.latency [--quick] [--rounds 3]
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import accepts, free_port
from pg_eventstream.servers.pushpin import Pushpin

from . import floor, report
from .report import Comparison, Report, at_most, say
from .servers import OURS, PEER, SIG_KEY, Database, postgres, pushpin
from .streams import Streams

FLOOR = "floor"
RATES = (1, 100, 1000)
#: The seconds that a slice lasts in a full run and in a quick one.
SECONDS = {1: (20, 6), 100: (4, 2), 1000: (3, 1)}


class System:
    """One of the compared systems: its sender, and the proxy to which its client connects."""

    def __init__(self, name: str, database: Database, proxy: Pushpin) -> None:
        self.name, self.database, self.proxy = name, database, proxy
        self.sent = 0
        self.sender = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.paced_sender", name],
            env=database.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def order(self, start: float, rate: int, count: int) -> None:
        assert self.sender.stdin
        self.sender.stdin.write(json.dumps([start, rate, self.sent, count]) + "\n")
        self.sender.stdin.flush()
        self.sent += count

    def answer(self) -> str:
        assert self.sender.stdout
        line = self.sender.stdout.readline()
        assert line, f"the sender of {self.name} has ended"
        return line


@contextmanager
def system(name: str, server: Postgres) -> Iterator[System]:
    """A database, a Pushpin with its origin, the process between them, and a sender."""
    with ExitStack() as stack:
        origin = free_port()
        proxy = stack.enter_context(pushpin(server.directory / f"pushpin-{name}", origin))
        url = f"{proxy.control_url}?key={SIG_KEY}"
        database = Database(server, name, PEER if name == PEER else OURS, GRIP_URL=url)
        if name == FLOOR:
            with database.connect() as connection:
                connection.execute(floor.TABLE)
            process = database.process(
                *("floor", "-m", "benchmarks.floor"),
                *(database.dsn, str(proxy.control_port), str(origin)),
            )
            process.start(ready=lambda: accepts(origin))
            stack.callback(process.kill)
        else:
            stack.enter_context(database.site(origin))
        if name == OURS:
            stack.enter_context(database.publisher())
        found = System(name, database, proxy)
        stack.callback(found.sender.kill)
        assert found.answer() == "ready\n"
        yield found


async def measure(
    systems: list[tuple[System, Streams]], rate: int, seconds: float
) -> dict[str, tuple[list[float], float]]:
    """Latencies in milliseconds and events committed per second, by the name of the system."""
    count = max(5, int(rate * seconds))
    firsts = {system.name: system.sent for system, _ in systems}
    start = time.monotonic() + 0.1
    for n, (system, streams) in enumerate(systems):
        streams.expect(system.sent + count - 1)
        system.order(start + n / len(systems) / rate, rate, count)
    found = {}
    for system, streams in systems:
        committed = {
            int(n): at for n, at in json.loads(await asyncio.to_thread(system.answer)).items()
        }
        (stream,) = streams.streams
        deadline = time.monotonic() + 15
        while len(stream.numbers) < count and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        first = firsts[system.name]
        expected = range(first, first + count)
        assert sorted(stream.numbers) == list(expected), (
            f"{system.name}: {len(stream.numbers)} of {count} arrived; missing are"
            f" {sorted(set(expected).difference(stream.numbers))[:20]}"
        )
        if system.name == OURS:
            check_order(system.database, stream.numbers.tolist(), count)
        latencies = [
            (time - committed[n]) * 1000
            for n, time in zip(stream.numbers, stream.times, strict=True)
        ]
        took = max(committed.values()) - min(committed.values())
        found[system.name] = (latencies, (count - 1) / took)
    return found


def check_order(database: Database, numbers: list[int], count: int) -> None:
    """Assert that the events arrived in the order of their ids."""
    with database.connect() as connection:
        rows = connection.execute(
            "SELECT (e.data::jsonb->>'n')::int FROM pg_eventstream_stream s"
            " JOIN pg_eventstream_event e ON e.id = s.event_id ORDER BY s.eid DESC LIMIT %s",
            [count],
        ).fetchall()
    assert numbers == [n for (n,) in reversed(rows)], "not in order"


def comparisons(rate: int) -> dict[tuple[str, str], Comparison]:
    """The comparisons, by figure and by the system that ours is compared with."""
    goals = {
        ("median", FLOOR): at_most(1.3),
        ("99th percentile", FLOOR): at_most(2),
        ("maximum", FLOOR): None,
        ("median", PEER): at_most(1),
        ("99th percentile", PEER): at_most(1),
    }
    return {
        key: Comparison(f"{rate}/s: latency, {key[0]}", "ms", OURS, key[1], goal)
        for key, goal in goals.items()
        if not (rate == 1000 and key[1] == PEER)
    }


def figures(latencies: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {"median": cuts[49], "99th percentile": cuts[98], "maximum": max(latencies)}


async def run(systems: list[System], options: report.Options) -> Report:
    found = {rate: comparisons(rate) for rate in RATES}
    facts: dict[str, float | int | str] = {}
    reached: dict[tuple[str, int], list[float]] = {}
    async with AsyncExitStack() as stack:
        # HTTP/1.0, because chunks can split an event when the proxy relays a page.
        open_ = [
            (system, await stack.enter_async_context(Streams(system.proxy.port, 1, version="1.0")))
            for system in systems
        ]
        for pair in open_:
            await measure([pair], 100, 1)  # loads everything that is loaded lazily
            log = pair[0].proxy.log_path.read_text()
            assert "receivers=1" in log, f"{pair[0].name}: the proxy does not hold the stream"
        for n in range(options.rounds):
            turns = open_ if n % 2 else open_[::-1]
            for rate in RATES:
                seconds = SECONDS[rate][options.quick]
                measured = {}
                if rate == 1:
                    measured = await measure(turns, rate, seconds)
                else:
                    for pair in turns:
                        # The peer cannot send at this rate, so it is measured only once.
                        if not (rate == 1000 and pair[0].name == PEER and n):
                            measured |= await measure([pair], rate, seconds)
                for name, (latencies, per_second) in measured.items():
                    values = figures(latencies)
                    reached.setdefault((name, rate), []).append(per_second)
                    for (figure, base), comparison in found[rate].items():
                        if name in (OURS, base):
                            comparison.add(name, values[figure])
                    say(
                        "latency",
                        f"{rate}/s, round {n + 1}, {name} ({per_second:,.0f}/s reached): "
                        + ", ".join(f"{figure} {value:.2f} ms" for figure, value in values.items()),
                    )
    for (name, rate), rates in reached.items():
        facts[f"{name}, {rate}/s: committed per second"] = round(statistics.median(rates), 1)
    return Report([c for by_key in found.values() for c in by_key.values()], facts)


def benchmark(options: report.Options) -> Report:
    with ExitStack() as stack:
        server = stack.enter_context(postgres())
        systems = [stack.enter_context(system(name, server)) for name in (OURS, FLOOR, PEER)]
        return asyncio.run(run(systems, options))


if __name__ == "__main__":
    report.main("latency", __doc__, benchmark)
