"""Consumers beside a session that holds a snapshot for hours: does each event cost more in the end?

One process handles events with batch 1, so that a checkpoint moves for each of them, while vacuum
can remove no dead version. A part near the end is compared with one near the beginning.
synchronous_commit is off, so that waiting for the disk hides nothing.

    python -m benchmarks.consume_held [--quick] [--rounds 1]
"""

from __future__ import annotations

from contextlib import ExitStack

from pg_eventstream.servers.postgres import Postgres

from . import report
from .consume import FIRST, LAST, Consumers, parts
from .report import Comparison, Report, at_least, at_most, say
from .servers import postgres

EVENTS = 80_000


def beside_a_snapshot(server: Postgres, events: int) -> list[Comparison]:
    """Events that are handled one by one while a session holds a snapshot."""
    rates, work = (
        Comparison(f"{events:,} events beside a held snapshot, {what}", unit, LAST, FIRST, goal)
        for what, unit, goal in (
            ("batch 1", "events/s", at_least(0.8)),
            ("processor time", "µs per event", at_most(1.25)),
        )
    )
    way = Consumers(server)
    try:
        way.fill(events)
        with way.database.connect(autocommit=False) as held, ExitStack() as stack:
            held.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            held.execute("SELECT count(*) FROM pg_eventstream_event")
            [process] = way.processes(1, 1, start="earliest")
            stack.callback(process.stop)
            process.start()
            for when, end in ((FIRST, 2), (LAST, 9)):
                way.wait((end - 1) * events // 10)
                before = way.used(process)
                way.wait(end * events // 10)
                cpu, count = (
                    now - then for now, then in zip(way.used(process), before, strict=True)
                )
                work.add(when, 1e6 * cpu / count)
            way.wait(events)
        parts(way, events, rates)
    finally:
        way.close()
    say("consume_held", f"{rates}\n{work}")
    return [rates, work]


def benchmark(options: report.Options) -> Report:
    found = Report([])
    for _ in range(options.rounds):
        with postgres(synchronous_commit="off") as server:
            comparisons = beside_a_snapshot(server, 20_000 if options.quick else EVENTS)
        if not found.comparisons:
            found.comparisons = comparisons
        else:
            for known, new in zip(found.comparisons, comparisons, strict=True):
                for way, figures in new.rounds.items():
                    known.rounds[way] += figures
    return found


if __name__ == "__main__":
    report.main("consume_held", __doc__, benchmark, rounds=1)
