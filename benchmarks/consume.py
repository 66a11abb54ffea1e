"""How fast consumers handle events, and how long after a commit.

The handler is one INSERT. Each way stores in the same transaction that the event is handled:

    consumers       manage.py eventstream_consumers run: in the order of each channel
    outbox          a usual outbox, written for this comparison (`consuming.py`): SELECT ... FOR
                    UPDATE SKIP LOCKED, and DELETE; in no order
    eventsourcing   the projection runner of this package: one process, one event per transaction
    pgpubsub        django-pgpubsub with lock_notifications; in no order. Its batch is `--recover`,
                    which handles everything that waits in one transaction

Events of 1,000 channels are committed at once while all processes wait for them. The time is
measured from that commit until the last is handled (`--recover`: from the first to the last), so
ours includes putting them in order.

Also measured: a rebuild from a long stream, and the statements of consumers that have nothing to
do.

    python -m benchmarks.consume [--quick] [--rounds 3]
"""

from __future__ import annotations

import re
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import Process, children, wait_until

from . import report
from .consuming import OUTBOX, TABLE, eventsourcing_environment
from .idle import _cpu_seconds
from .report import Comparison, Report, at_least, at_most, say
from .servers import OURS, PUBSUB, Database, postgres

CHANNELS, WARM_UP = 1000, 200
TEXT = "a line of a chat, as long as such lines are; " * 2
PATIENCE = 3600
REBUILT = 200_000
FIRST, LAST = "second tenth", "ninth tenth"


class Way(ABC):
    """One way of handling events. Its processes run in `running`."""

    name: str
    #: Batch -> events of a measurement, in a full run.
    events: Mapping[int, int]

    def __init__(self, server: Postgres, name: str = "", package: str = OURS) -> None:
        self.database = Database(server, name or f"{self.name}_consumed", package)
        self.connection = self.database.connect()
        self.connection.execute(TABLE)

    def close(self) -> None:
        self.connection.close()

    @abstractmethod
    def processes(self, batch: int, number: int) -> list[Process]: ...

    @abstractmethod
    def insert(self, count: int) -> None:
        """Insert events, and notify the processes that wait for them."""

    def is_ready(self, number: int) -> bool:
        """Whether this number of processes waits for events."""
        return self._sessions() >= number

    @contextmanager
    def running(self, batch: int, number: int) -> Iterator[list[Process]]:
        with ExitStack() as stack:
            processes = self.processes(batch, number)
            for process in processes:
                stack.callback(process.stop)
                process.start()
            wait_until(lambda: self.is_ready(number), timeout=60, check=0.1)
            time.sleep(1)
            self.connection.execute("TRUNCATE effect")
            self.send(WARM_UP)
            self.wait(WARM_UP)
            yield processes

    def send(self, count: int) -> float:
        """Commit events at once. Returns when they were committed (`time.time`)."""
        with self.connection.transaction():
            self.insert(count)
        return time.time()

    def wait(self, count: int) -> None:
        # Counting takes time that is not to be measured.
        check = 0.05 if count < 20_000 else 1.0
        wait_until(lambda: self.count() >= count, timeout=PATIENCE, check=check)

    def count(self) -> int:
        return int(self._value("SELECT count(*) FROM effect"))

    def rate(self, batch: int, number: int, events: int) -> float:
        """Events per second."""
        with self.running(batch, number):
            self.connection.execute("TRUNCATE effect")
            began = self.send(events)
            self.wait(events)
        return events / (self.last() - began)

    def last(self) -> float:
        return float(self._value("SELECT extract(epoch FROM max(at))::float8 FROM effect"))

    def nth(self, number: int) -> float:
        """When so many were handled."""
        return float(
            self._value(
                "SELECT extract(epoch FROM at)::float8 FROM effect ORDER BY at"
                f" OFFSET {number - 1} LIMIT 1"
            )
        )

    def latencies(self, seconds: float, rate: float) -> list[float]:
        """Milliseconds from each commit until its event is handled, in one process."""
        with self.running(1, 1):
            self.connection.execute("TRUNCATE effect")
            committed = []
            start = time.time()
            for n in range(int(seconds * rate)):
                time.sleep(max(0.0, start + n / rate - time.time()))
                committed.append(self.send(1))
            self.wait(len(committed))
            rows = self.connection.execute(
                "SELECT extract(epoch FROM at)::float8 FROM effect ORDER BY event"
            ).fetchall()
        return [1000 * (at - sent) for sent, (at,) in zip(committed, rows, strict=True)]

    def backends(self) -> list[int]:
        """The processes of PostgreSQL that serve sessions which consume or wait."""
        rows = self.connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        return [pid for (pid,) in rows]

    def _value(self, query: str) -> Any:
        row = self.connection.execute(query).fetchone()
        assert row
        return row[0]

    def _sessions(self) -> int:
        return int(
            self._value(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
                " AND state = 'idle'"
            )
        )


class Consumers(Way):
    name = "consumers"
    events: Mapping[int, int] = {1: 4000, 100: 12_000}

    def processes(self, batch: int, number: int, start: str = "latest") -> list[Process]:
        # New ones, which begin with what is sent from now on.
        self.connection.execute(
            "TRUNCATE pg_eventstream_consumer, pg_eventstream_checkpoint, pg_eventstream_slot"
        )
        # Not one with --processes: Linux gives each session the same share of the processors
        # (sched_autogroup), and each process of the others has a session of its own.
        return [self.process(f"consumers-{n}", batch, start=start) for n in range(number)]

    def process(
        self,
        name: str,
        batch: int,
        *,
        processes: int = 1,
        consumers: int = 1,
        start: str = "latest",
    ) -> Process:
        return self.database.process(
            name,
            *("-m", "django", "eventstream_consumers", "run", "--processes", str(processes)),
            BENCHMARK_BATCH=str(batch),
            BENCHMARK_CONSUMERS=str(consumers),
            BENCHMARK_START=start,
        )

    def insert(self, count: int) -> None:
        self.connection.execute(
            """
            INSERT INTO pg_eventstream_event (channel, data)
            SELECT 'line-' || n %% %s, json_build_object('n', n, 'text', %s::text)
              FROM generate_series(1, %s) AS n
            """,
            [CHANNELS, TEXT, count],
        )

    def fill(self, events: int) -> None:
        """Only so many events are stored, and in order. Nothing is handled."""
        self.connection.execute(
            "TRUNCATE effect, pg_eventstream_event, pg_eventstream_outbox, pg_eventstream_stream"
        )
        for _ in range(0, events, 10_000):
            self.send(min(events, 10_000))
        while self._value("SELECT pg_eventstream_sequence()"):
            pass

    def used(self, process: Process) -> tuple[float, int]:
        """The processor time of its processes and their backends, and what they have handled."""
        used = sum(map(_cpu_seconds, (*children(process.pid), *self.backends())))
        return used, self.count()

    def is_ready(self, number: int) -> bool:
        return bool(
            self._value(
                "SELECT EXISTS (SELECT FROM pg_eventstream_slot WHERE holder <> ''"
                f" GROUP BY consumer_id HAVING count(*) = 16 AND count(DISTINCT holder) = {number})"
            )
        )


class Outbox(Way):
    name = "outbox"
    events: Mapping[int, int] = {1: 4000, 100: 12_000}

    def __init__(self, server: Postgres) -> None:
        super().__init__(server)
        self.connection.execute(OUTBOX)

    def processes(self, batch: int, number: int) -> list[Process]:
        return [
            self.database.process(f"outbox-{n}", "-m", "benchmarks.consuming", "outbox", str(batch))
            for n in range(number)
        ]

    def is_ready(self, number: int) -> bool:
        return self._sessions() >= 2 * number

    def insert(self, count: int) -> None:
        self.connection.execute(
            """
            INSERT INTO outbox (channel, data)
            SELECT 'line-' || n %% %s, json_build_object('n', n, 'text', %s::text)
              FROM generate_series(1, %s) AS n
            """,
            [CHANNELS, TEXT, count],
        )
        self.connection.execute("NOTIFY outbox")


class EventSourcing(Way):
    name = "eventsourcing"
    events: Mapping[int, int] = {1: 2000, 100: 2000}

    def __init__(self, server: Postgres) -> None:
        super().__init__(server)
        environment = eventsourcing_environment(self.database.environment)
        self.database.environment = environment
        from .eventsourced import Line, Lines

        lines = Lines(environment)
        lines.save(Line("line-0", TEXT))
        lines.close()
        self.table = "lines_events"

    def processes(self, batch: int, number: int) -> list[Process]:
        # It has neither batches nor several processes.
        return [
            self.database.process("eventsourcing", "-m", "benchmarks.consuming", "eventsourcing")
        ]

    def is_ready(self, number: int) -> bool:
        return self._sessions() >= 2

    def insert(self, count: int) -> None:
        # As its application inserts them, but all at once. It locks the table, too.
        self.connection.execute(
            f"""
            INSERT INTO {self.table} (originator_id, originator_version, topic, state)
            SELECT gen_random_uuid(), 1, topic, state
              FROM (SELECT * FROM {self.table} LIMIT 1) AS line, generate_series(1, %s)
            """,
            [count],
        )
        self.connection.execute(f"NOTIFY {self.table}")


class PubSub(Way):
    name = PUBSUB
    events: Mapping[int, int] = {1: 500, 100: 2000}

    def __init__(self, server: Postgres) -> None:
        super().__init__(server, package=PUBSUB)

    def processes(self, batch: int, number: int, *arguments: str) -> list[Process]:
        return [
            self.database.process(
                f"pgpubsub-{n}",
                *("-m", "django", "listen", "--worker", "--loglevel", "error", *arguments),
            )
            for n in range(number)
        ]

    def insert(self, count: int) -> None:
        self.connection.execute(
            """
            INSERT INTO project_message (channel, data)
            SELECT 'line-' || n %% %s, json_build_object('n', n, 'text', %s::text)
              FROM generate_series(1, %s) AS n
            """,
            [CHANNELS, TEXT, count],
        )

    def rate(self, batch: int, number: int, events: int) -> float:
        if batch == 1:
            return super().rate(batch, number, events)
        self.connection.execute("TRUNCATE effect")
        self.send(events)
        with ExitStack() as stack:
            for process in self.processes(batch, number, "--recover"):
                stack.callback(process.stop)
                process.start()
            self.wait(events)
        first = self._value("SELECT extract(epoch FROM min(at))::float8 FROM effect")
        return (events - 1) / (self.last() - float(first))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def benchmark(options: report.Options) -> Report:
    with ExitStack() as stack:
        server = stack.enter_context(postgres())
        consumers = Consumers(server)
        ways = [consumers, Outbox(server), EventSourcing(server), PubSub(server)]
        for way in ways:
            stack.callback(way.close)
        found = Report([])
        found.comparisons += rates(ways, options)
        found.comparisons += latencies(ways, options)
        found.comparisons += rebuild(consumers, options, found.facts)
    with postgres(log_statement="all", log_line_prefix="%p ") as server:
        idle(server, options, found.facts)
    return found


def rates(ways: list[Way], options: report.Options) -> list[Comparison]:
    comparisons = []
    for number in (1, 8):
        for batch in (1, 100):
            far = at_least(3) if batch == 100 else None
            comparison = Comparison(
                f"batch {batch}, {number} process{'es' if number > 1 else ''}",
                "events/s",
                Consumers.name,
                Outbox.name,
                at_least(1.0),
                also={EventSourcing.name: far, PubSub.name: far},
            )
            comparisons.append(comparison)
            for n in range(options.rounds):
                for way in ways if n % 2 else ways[::-1]:
                    events = way.events[batch] // (4 if options.quick else 1)
                    rate = way.rate(batch, number, events)
                    comparison.add(way.name, rate)
                    say("consume", f"{comparison.what}, {way.name}: {rate:,.0f} events/s")
    return comparisons


def latencies(ways: list[Way], options: report.Options) -> list[Comparison]:
    middle, late = (
        Comparison(
            f"commit to handled, 50 events/s, {what}",
            "ms",
            Consumers.name,
            Outbox.name,
            also={EventSourcing.name: None, PubSub.name: None},
        )
        for what in ("median", "99th percentile")
    )
    for n in range(options.rounds):
        for way in ways if n % 2 else ways[::-1]:
            found = way.latencies(3 if options.quick else 5, 50)
            middle.add(way.name, statistics.median(found))
            late.add(way.name, percentile(found, 0.99))
            say("consume", f"{way.name}: {middle.rounds[way.name][-1]:.2f} ms")
    return [middle, late]


def rebuild(
    way: Consumers, options: report.Options, facts: dict[str, float | int | str]
) -> list[Comparison]:
    """A new consumer handles all that is stored, in one process."""
    events = 20_000 if options.quick else REBUILT
    rates, memory = (
        Comparison(f"rebuild of {events:,} events, {what}", unit, LAST, FIRST, goal)
        for what, unit, goal in (
            ("batch 100", "events/s", at_least(0.8)),
            ("memory", "MB", at_most(1.2)),
        )
    )
    way.fill(events)
    [process] = way.processes(100, 1, start="earliest")
    process.start()
    try:
        for when, count in ((FIRST, events // 10), (LAST, events)):
            way.wait(count)
            memory.add(when, private_megabytes(children(process.pid)[0]))
    finally:
        process.stop()
    parts(way, events, rates)
    facts["rebuild: events per second"] = round(events / (way.nth(events) - way.nth(1)))
    say("consume", str(rates))
    return [rates, memory]


def parts(way: Way, events: int, comparison: Comparison) -> None:
    """The rates of a tenth near the beginning and of the last one. All processes run in both."""
    tenth = events // 10
    for when, end in ((FIRST, 2 * tenth), (LAST, 9 * tenth)):
        comparison.add(when, tenth / (way.nth(end) - way.nth(end - tenth)))


def idle(server: Postgres, options: report.Options, facts: dict[str, float | int | str]) -> None:
    """Two processes with ten consumers each, which have nothing to do."""
    way = Consumers(server, "idle_consumers")
    try:
        process = way.process("idle", 1, processes=2, consumers=10)
        process.start(ready=lambda: way.is_ready(2), timeout=60)
        time.sleep(5)
        backends = way.backends()
        pids = [process.pid, *children(process.pid), *backends]
        own = re.compile(
            rf"^(?:{'|'.join(map(str, backends))}) LOG:  (?:statement|execute \S+):", re.M
        )
        seconds = 10 if options.quick else 30
        log = server.log_path
        before = sum(map(_cpu_seconds, pids)), len(own.findall(log.read_text()))
        time.sleep(seconds)
        cpu = sum(map(_cpu_seconds, pids)) - before[0]
        statements = len(own.findall(log.read_text())) - before[1]
    finally:
        process.stop()
        way.close()
    facts["10 idle consumers in 2 processes: statements a second"] = round(statements / seconds, 1)
    facts["10 idle consumers in 2 processes: connections"] = len(backends)
    facts["10 idle consumers in 2 processes: processor time, % of a core"] = round(
        100 * cpu / seconds, 1
    )


def private_megabytes(pid: int) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in rollup.splitlines() if "Private" in line) / 1000


if __name__ == "__main__":
    report.main("consume", __doc__, benchmark)
