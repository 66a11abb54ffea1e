"""How long the first event of a backlog waits to be sequenced, and how long all events take.

A backlog of 2,000,000 events is sequenced in slices, as now, and in one statement, as before. It
was committed by one transaction, by transactions of 100 events, or by transactions of 100 events
while a session holds a snapshot. The benchmark measures the time until the first events have their
places, so that they can be published, and until all have. Events are spread over 1,000 channels.

    python -m benchmarks.slices [--quick] [--rounds 3]
"""

from __future__ import annotations

import time
from contextlib import nullcontext

from . import report
from .at_once import sequence_as_before
from .report import Comparison, Report, at_most, say
from .servers import OURS, Database, postgres

SLICES, AT_ONCE = "slices", "one statement"
ONE, MANY = "one transaction", "transactions of 100 events"
HELD = f"{MANY}, with a held snapshot"
PER_TRANSACTION = 100
CHANNELS = 1000

#: Fills only the tables that sequence() reads, which does not read the events themselves.
ONE_INSERT = f"""
INSERT INTO pg_eventstream_outbox (xid, event_id, channel)
SELECT pg_current_xact_id(), n, 'channel-' || n % {CHANNELS}
  FROM generate_series(1, {{events}}) AS n
"""
MANY_INSERTS = f"""
DO $$ BEGIN
    FOR i IN 0 .. {{events}} / {PER_TRANSACTION} - 1 LOOP
        INSERT INTO pg_eventstream_outbox (xid, event_id, channel)
        SELECT pg_current_xact_id(), i * {PER_TRANSACTION} + n, 'channel-' || n % {CHANNELS}
          FROM generate_series(1, {PER_TRANSACTION}) AS n;
        COMMIT;
    END LOOP;
END $$
"""


def sequence(database: Database, shape: str, events: int) -> tuple[float, float]:
    """Seconds until the first events had their places, and until all had."""
    with database.connect() as connection:
        connection.execute("SET synchronous_commit = off")
        if shape == ONE:
            connection.execute(ONE_INSERT.format(events=events))
        else:
            connection.execute(MANY_INSERTS.format(events=events))
        connection.execute("RESET synchronous_commit")
        connection.execute("CHECKPOINT")
        with database.connect(autocommit=False) if shape == HELD else nullcontext() as held:
            if held:
                held.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                held.execute("SELECT count(*) FROM pg_eventstream_channel")
            first, done = 0.0, 0
            start = time.monotonic()
            while row := connection.execute("SELECT pg_eventstream_sequence()").fetchone():
                if not row[0]:
                    break
                done += row[0]
                first = first or time.monotonic() - start
            seconds = time.monotonic() - start
        assert done == events
        connection.execute("TRUNCATE pg_eventstream_outbox")
        connection.execute("VACUUM pg_eventstream_stream")
    return first, seconds


def benchmark(options: report.Options) -> Report:
    events = 200_000 if options.quick else 2_000_000
    comparisons = {
        (shape, what): Comparison(f"{shape}: {what}", "s", SLICES, AT_ONCE, at_most(goal))
        for shape in (ONE, MANY, HELD)
        for what, goal in (("first event", 1.0), ("all events", 1.2))
    }
    with postgres(max_wal_size="8GB") as server:
        ways = {SLICES: Database(server, OURS), AT_ONCE: Database(server, "at_once")}
        sequence_as_before(ways[AT_ONCE])
        for database in ways.values():
            sequence(database, MANY, 10_000)  # so that no table is empty
        for n in range(options.rounds):
            for shape in (ONE, MANY, HELD):
                for way in list(ways)[:: 1 if n % 2 else -1]:
                    first, seconds = sequence(ways[way], shape, events)
                    comparisons[shape, "first event"].add(way, first)
                    comparisons[shape, "all events"].add(way, seconds)
                    say("slices", f"{shape}, {way}: {first:.2f} s, {seconds:.2f} s")
    return Report(list(comparisons.values()), {"events": events})


if __name__ == "__main__":
    report.main("slices", __doc__, benchmark)
