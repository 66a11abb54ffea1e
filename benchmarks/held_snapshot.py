"""What a session costs that holds a snapshot for hours: a backup, a report, an idle client.

Vacuum cannot remove rows that died after that snapshot. Events pass, in turns, through two ways of
relaying them:

    sequence        ours: pg_eventstream_sequence(), which finds new events without deleting
                    anything, with the pruner, which removes old ones
    outbox table    the usual outbox, written for this comparison: SELECT ... FOR UPDATE SKIP
                    LOCKED LIMIT 100, and DELETE, in order of its key

300,000 events pass through each. The end is compared with the beginning: how long a call takes that
finds a single event, and how many events per second pass, 5,000 at a time. Between these
measurements, events pass through the outbox table 10,000 at a time, which favors it. (The seconds
for this are not comparable: ours arrive in transactions of 100 and are pruned.)

    python -m benchmarks.held_snapshot [--quick] [--rounds 3]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import psycopg

from . import report
from .backlog import configure, fill
from .report import Comparison, Report, at_least, at_most, say
from .servers import OURS, Database, postgres

BATCH, CALLS = 100, 100
#: The number of events that pass at once between the measurements.
STEP = 10_000
BEGINNING, END = "beginning", "end"

TABLE = """
CREATE TABLE outbox (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, channel text NOT NULL, data text NOT NULL)
"""
CLAIM = """
DELETE FROM outbox WHERE id IN (
    SELECT id FROM outbox ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED) RETURNING id
"""

Connection = psycopg.Connection[Any]


class Sequence:
    """The function of this package."""

    name = "sequence"

    def __init__(self, connection: Connection) -> None:
        from pg_eventstream.publisher.pruner import Pruner

        self._connection = connection
        self._sweep = Pruner(connection)

    def send(self, count: int) -> None:
        fill(self._connection, "room", count)

    def relay(self) -> int:
        row = self._connection.execute("SELECT pg_eventstream_sequence()").fetchone()
        assert row
        return int(row[0])

    def pass_step(self) -> None:
        drain(self, STEP)

    def sweep(self) -> None:
        self._sweep.run_once()


class OutboxTable:
    """The usual outbox."""

    name = "outbox table"

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        connection.execute(TABLE)

    def send(self, count: int) -> None:
        self._connection.execute(
            "INSERT INTO outbox (channel, data)"
            " SELECT 'room', repeat('a line of a chat, ', 6) FROM generate_series(1, %s)",
            [count],
        )

    def relay(self) -> int:
        return len(self._connection.execute(CLAIM, [BATCH]).fetchall())

    def pass_step(self) -> None:
        assert len(self._connection.execute(CLAIM, [STEP]).fetchall()) == STEP

    def sweep(self) -> None:
        """Nothing is left to sweep."""


Way = Sequence | OutboxTable


def latency(way: Way) -> float:
    """Milliseconds until a call has found a single event; the median."""
    times = []
    for _ in range(CALLS):
        way.send(1)
        start = time.perf_counter()
        assert way.relay() == 1
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def rate(way: Way, events: int = 5000) -> float:
    """Events of a backlog per second."""
    way.send(events)
    start = time.perf_counter()
    drain(way, events)
    return events / (time.perf_counter() - start)


def drain(way: Way, events: int) -> None:
    while events:
        relayed = way.relay()
        assert 0 < relayed <= events, "events were lost or relayed twice"
        events -= relayed


def pass_on(way: Way, events: int) -> None:
    for _ in range(events // STEP):
        way.send(STEP)
        way.pass_step()
        way.sweep()


def benchmark(options: report.Options) -> Report:
    events = 50_000 if options.quick else 300_000
    configure()
    found = Report([])
    with postgres() as server:
        database = Database(server, OURS)
        with database.connect() as one, database.connect() as two:
            ways: list[Way] = [Sequence(one), OutboxTable(two)]
            latencies, rates = (
                {way.name: Comparison(f"{way.name}: {what}", unit, END, BEGINNING) for way in ways}
                for what, unit in (("latency", "ms"), ("backlog", "events/s"))
            )
            found.comparisons += [*latencies.values(), *rates.values()]
            latencies[Sequence.name].goal = at_most(1.2)
            rates[Sequence.name].goal = at_least(0.8)

            def measure(when: str) -> None:
                for n in range(options.rounds):
                    for way in ways if n % 2 else ways[::-1]:
                        latencies[way.name].add(when, latency(way))
                        rates[way.name].add(when, rate(way))
                for way in ways:
                    milliseconds = latencies[way.name].rounds[when][-1]
                    say("held_snapshot", f"{way.name}, {when}: {milliseconds:.2f} ms")

            for way in ways:  # so that all plans are made and no table is empty
                rate(way)
                latency(way)
            with database.connect(autocommit=False) as held:
                held.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                held.execute("SELECT count(*) FROM pg_eventstream_event")
                measure(BEGINNING)
                for way in ways:
                    start = time.monotonic()
                    pass_on(way, events)
                    seconds = round(time.monotonic() - start, 1)
                    found.facts[f"{way.name}: seconds for {events:,} events"] = seconds
                measure(END)
    return found


if __name__ == "__main__":
    report.main("held_snapshot", __doc__, benchmark)
