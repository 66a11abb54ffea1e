"""How long events wait while the cursor is vacuumed.

A session has held a snapshot for hours, so the cursor has 2,000,000 dead row versions. Vacuum works
on them while events are sequenced, one at a time, with the advisory lock that is used now and with
the lock on the cursor's table that was used before. The benchmark measures the longest wait in half
a second; the median of ten.

    python -m benchmarks.vacuum [--quick] [--rounds 3]
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

import psycopg

from . import report
from .at_once import sequence_as_before
from .report import Comparison, Report, at_most, say
from .servers import OURS, Database, postgres

NOW, BEFORE = "advisory lock", "table lock"
AT_REST = "without vacuum"
WINDOWS, WINDOW_SECONDS = 10, 0.5


def make_dead(database: Database, versions: int) -> None:
    """Leave dead rows as sequence() does: their key has changed."""
    with database.connect() as connection:
        connection.execute("SELECT pg_eventstream_sequence()")
        connection.execute(
            """
            INSERT INTO pg_eventstream_cursor (position, snapshot, cluster)
            SELECT -n, '3:3:', 0 FROM generate_series(1, %s) AS n
            """,
            [versions],
        )
        connection.execute("DELETE FROM pg_eventstream_cursor WHERE position < 0")


def longest_wait(database: Database, vacuum: bool) -> float:
    """Milliseconds. Vacuum runs repeatedly; the held snapshot prevents it from removing rows."""
    over = threading.Event()

    def clean() -> None:
        with database.connect() as connection:
            while not over.is_set():
                connection.execute("VACUUM (TRUNCATE off) pg_eventstream_cursor")

    thread = threading.Thread(target=clean)
    with database.connect() as connection:
        if vacuum:
            thread.start()
        times = [_longest_in_a_window(connection) for _ in range(WINDOWS)]
        over.set()
        if vacuum:
            thread.join()
    return statistics.median(times) * 1000


def _longest_in_a_window(connection: psycopg.Connection[Any]) -> float:
    longest = 0.0
    deadline = time.monotonic() + WINDOW_SECONDS
    while time.monotonic() < deadline:
        connection.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('room', '')")
        start = time.perf_counter()
        row = connection.execute("SELECT pg_eventstream_sequence()").fetchone()
        longest = max(longest, time.perf_counter() - start)
        assert row == (1,)
    return longest


def benchmark(options: report.Options) -> Report:
    versions = 200_000 if options.quick else 2_000_000
    found = Comparison(
        "longest wait during vacuum", "ms", NOW, BEFORE, at_most(0.5), {AT_REST: None}
    )
    with postgres() as server:
        ways = {NOW: Database(server, OURS), BEFORE: Database(server, "table_lock")}
        sequence_as_before(ways[BEFORE])
        with (
            ways[NOW].connect(autocommit=False) as one,
            ways[BEFORE].connect(autocommit=False) as two,
        ):
            for held in (one, two):
                held.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                held.execute("SELECT count(*) FROM pg_eventstream_event")
            for database in ways.values():
                make_dead(database, versions)
            for n in range(options.rounds):
                for way in list(ways)[:: 1 if n % 2 else -1]:
                    found.add(way, longest_wait(ways[way], vacuum=True))
                    say("vacuum", f"{way}: {found.rounds[way][-1]:.1f} ms")
                found.add(AT_REST, longest_wait(ways[NOW], vacuum=False))
    return Report([found], {"dead versions": versions})


if __name__ == "__main__":
    report.main("vacuum", __doc__, benchmark)
