"""Sending while as many events are pruned: throughput and the latency of a commit.

pgbench sends events in 1,000 channels, one per transaction, with 8 clients, while one session
sequences them every 20 ms and the bell is held, as an awake publisher does. In turns: alone, and
with a pruner that runs twice a second and prunes as many events as are sent, because as many reach
the end of their retention.

    full speed     as fast as the clients can: commits per second
    steady rate    at 40 % of that (pgbench --rate): 99th percentile of a commit's latency
    held snapshot  the same with a REPEATABLE READ session that began before another 300,000 events
                   were pruned (30,000 if quick), so that vacuum can remove none of them

Also measured: what a batch of the pruner costs with that snapshot, at the beginning and at the end.

    python -m benchmarks.prune [--quick] [--rounds 3]
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from . import report
from .report import Comparison, Report, at_least, at_most, say
from .send import bell_held
from .servers import Database, postgres

if TYPE_CHECKING:
    from pg_eventstream.publisher.pruner import Pruner

CLIENTS = 8
ALONE, SWEPT = "alone", "while pruning"
SEND = """\\set channel random(1, 1000)
INSERT INTO pg_eventstream_event (channel, data)
VALUES ('c' || :channel, '{"text": "a line of a chat, as long as such lines are"}');
"""
# Events that were sequenced two days ago, %(rate)s per second, and after them one event
# per channel that stays, because a log contains a day of events above those that are pruned.
FILL = """
    WITH sent AS (
        INSERT INTO pg_eventstream_event (channel, data)
        SELECT 'c' || n %% 1000, '{"text": "a line of a chat, as long as such lines are"}'
          FROM generate_series(1, %(events)s + 1000) AS n
        RETURNING id, channel
    ), tip AS MATERIALIZED (
        SELECT channel,
               coalesce((SELECT max(eid) FROM pg_eventstream_stream AS s
                          WHERE s.channel = named.channel), 0) AS eid
          FROM (SELECT DISTINCT channel FROM sent) AS named
    ), put AS (
        INSERT INTO pg_eventstream_stream (position, channel, eid, event_id, sequenced_at)
        SELECT coalesce((SELECT max(position) FROM pg_eventstream_cursor), 0)
               + row_number() OVER (ORDER BY id), channel,
               tip.eid + row_number() OVER (PARTITION BY channel ORDER BY id), id,
               CASE WHEN row_number() OVER (ORDER BY id) > %(events)s THEN now()
               ELSE to_timestamp(%(begin)s)
                    + row_number() OVER (ORDER BY id) / %(rate)s * interval '1 second' END
          FROM sent JOIN tip USING (channel)
    )
    UPDATE pg_eventstream_cursor SET position = position + %(events)s + 1000
"""
_DAYS = 2 * 24 * 3600.0


def benchmark(options: report.Options) -> Report:
    found = Report([])
    with postgres(max_wal_size="8GB") as server:
        database = Database(server, "prune")
        os.environ.update(database.environment)
        import django

        django.setup()
        run = Run(database, server.directory, 2 if options.quick else 5)
        for state in ("", ", held snapshot"):
            speed = Comparison(f"full speed{state}", "commits/s", SWEPT, ALONE, at_least(0.9))
            p99 = Comparison(f"steady rate, p99{state}", "ms", SWEPT, ALONE, at_most(1.2))
            found.comparisons += [speed, p99]
            if state:
                holder = database.connect(autocommit=False)
                holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                holder.execute("SELECT 1")
                first, last = run.batches(30_000 if options.quick else 300_000)
                found.facts["held snapshot: ms for the first batches of 1,000"] = first
                found.facts["held snapshot: ms for the last batches of 1,000"] = last
            for n in range(options.rounds):
                ways = (ALONE, SWEPT) if n % 2 == 0 else (SWEPT, ALONE)
                for way in ways:
                    speed.add(way, run.send(way)[0])
                rate = 0.4 * speed.rounds[ALONE][0]
                for way in ways:
                    p99.add(way, run.send(way, rate)[1])
                said = (
                    f"{way} {speed.rounds[way][-1]:,.0f}/s, p99 {p99.rounds[way][-1]:.1f} ms"
                    for way in (ALONE, SWEPT)
                )
                say("prune", f"round {n + 1}{state}: {'; '.join(said)}")
        holder.close()
    return found


class Run:
    """Sends for some seconds and measures."""

    def __init__(self, database: Database, directory: Path, seconds: int) -> None:
        self._database = database
        self._directory = directory
        self._seconds = seconds
        self._full_speed = 3000.0
        (directory / "send.sql").write_text(SEND)
        database.value("SELECT pg_eventstream_sequence()")

    def send(self, way: str, rate: float | None = None) -> tuple[float, float]:
        """Commits per second, and the 99th percentile of their latency in ms."""
        self._fill(round((rate or self._full_speed) * self._seconds), rate or self._full_speed)
        over = threading.Event()
        # A publisher would be awake.
        with bell_held(self._database), ThreadPoolExecutor(2) as pool:
            work = [pool.submit(self._sequence, over)]
            if way == SWEPT:
                work.append(pool.submit(self._sweep, over))
            try:
                tps, p99 = self._pgbench(*(["--rate", f"{rate:.0f}"] if rate else []))
            finally:
                over.set()
            pruned = [job.result() for job in work][-1]
        if way == SWEPT:
            due = (rate or self._full_speed) * self._seconds
            assert pruned > 0.8 * due, f"{pruned} of {due:.0f} events were pruned"
        if rate is None:
            self._full_speed = tps
        self._clean()
        return tps, p99

    def batches(self, events: int) -> tuple[float, float]:
        """Prune ``events``. Returns the median ms per batch of the first and the last tenth."""
        self._fill(events, 1e9)
        times = []
        with self._sweeping(retention=_DAYS / 2) as sweep:
            while True:
                began = time.perf_counter()
                if not sweep._prune_old(datetime.now(timezone.utc)):
                    break
                times.append((time.perf_counter() - began) * 1000)
        tenth = events // 10_000
        assert len(times) == events // 1000
        return (
            round(sorted(times[:tenth])[tenth // 2], 1),
            round(sorted(times[-tenth:])[tenth // 2], 1),
        )

    def _pgbench(self, *more: str) -> tuple[float, float]:
        for log in self._directory.glob("latency.*"):
            log.unlink()
        output = subprocess.run(
            [
                self._database.server.program("pgbench"),
                *("-n", "-f", self._directory / "send.sql", "-c", str(CLIENTS), "-j", "1"),
                *("-M", "prepared", "-T", str(self._seconds), *more),
                *("--log", "--log-prefix", self._directory / "latency", self._database.dsn),
            ],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        found = re.search(r"tps = ([\d.]+)", output)
        assert found, output
        logs = [log.read_text() for log in self._directory.glob("latency.*")]
        times = sorted(int(line.split()[2]) for log in logs for line in log.splitlines())
        return float(found[1]), times[len(times) * 99 // 100] / 1000

    def _fill(self, events: int, rate: float) -> None:
        with self._database.connect() as connection:
            connection.execute("SET session_replication_role = replica")
            self._begin = time.time() - _DAYS
            parameters = {"events": events, "rate": rate, "begin": self._begin}
            connection.execute(FILL, parameters)
            connection.execute("SET session_replication_role = origin")
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")

    def _sequence(self, over: threading.Event) -> int:
        with self._database.connect() as connection:
            while not over.wait(0.02):
                connection.execute("SELECT pg_eventstream_sequence()")
        return 0

    def _sweep(self, over: threading.Event) -> int:
        """Prune events while, one after the other, they reach the end of their retention."""
        pruned = 0
        with self._sweeping(retention=time.time() - self._begin) as sweep:
            while not over.wait(0.5):
                pruned += sweep.run_once()
        return pruned

    def _clean(self) -> None:
        with self._sweeping(retention=1e-6) as sweep:
            self._database.value("SELECT pg_eventstream_sequence()")
            sweep.run_once()

    @contextmanager
    def _sweeping(self, retention: float) -> Iterator[Pruner]:
        from django.test import override_settings

        from pg_eventstream.publisher.pruner import Pruner

        with (
            override_settings(EVENTSTREAM_RETENTION=retention),
            self._database.connect() as connection,
        ):
            yield Pruner(connection)


if __name__ == "__main__":
    report.main("prune", __doc__, benchmark)
