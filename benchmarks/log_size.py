"""What a long log costs: sequencing and publishing with 5,000,000 events in it, and with 10,000.

Two databases contain that many events, sequenced and published, after VACUUM ANALYZE. In turns,
each gets 20,000 more events, and the time is measured

    to sequence them              sent in 200 transactions: one call of pg_eventstream_sequence()
    to sequence and publish them  sent in one transaction: from its COMMIT until a client of Pushpin
                                  has the last event; the publisher has been running for a while

    python -m benchmarks.log_size [--quick] [--rounds 3]
"""

from __future__ import annotations

import itertools
import time
from functools import partial

from pg_eventstream.servers.processes import free_port, wait_until
from pg_eventstream.servers.pushpin import Pushpin

from . import report
from .backlog import INSERT, fill, receiver
from .report import Comparison, Report, at_most, say
from .servers import SIG_KEY, Database, postgres, pushpin

EVENTS = 20_000
SHORT, LONG = "short", "long"

_turns = itertools.count(1)


def lengthen(database: Database, count: int, proxy: Pushpin) -> None:
    """Put ``count`` events into the log, as if they had been published an hour ago.

    They have no rows in the outbox, from which the pruner would have removed them.
    """
    with database.connect() as connection:
        connection.execute("ALTER TABLE pg_eventstream_event DISABLE TRIGGER USER")
        connection.execute(INSERT, ["old", 1, count])
        connection.execute("ALTER TABLE pg_eventstream_event ENABLE TRIGGER USER")
        connection.execute(
            """
            INSERT INTO pg_eventstream_stream (position, channel, eid, event_id, sequenced_at)
            SELECT id, channel, id, id, now() - interval '1 hour'
              FROM pg_eventstream_event ORDER BY id
            """
        )
        # The first call finds nothing and stores a snapshot. Positions continue from there.
        connection.execute("SELECT pg_eventstream_sequence()")
        connection.execute("UPDATE pg_eventstream_cursor SET position = %s", [count])
        connection.execute(
            "INSERT INTO pg_eventstream_proxy (name, position) VALUES (%s, %s)",
            [proxy.control_url, count],
        )
        connection.execute("VACUUM ANALYZE")


def sequence(database: Database) -> float:
    """Seconds to sequence the events."""
    with database.connect() as connection:
        fill(connection, f"sequenced-{next(_turns)}", EVENTS)
        start = time.monotonic()
        row = connection.execute("SELECT pg_eventstream_sequence()").fetchone()
        seconds = time.monotonic() - start
        assert row == (EVENTS,)
        connection.execute(
            "UPDATE pg_eventstream_proxy SET position ="
            " (SELECT position FROM pg_eventstream_cursor)"
        )
    return seconds


def publish(database: Database, proxy: Pushpin) -> float:
    """Seconds from the COMMIT of the events until a client has the last."""
    channel = f"published-{next(_turns)}"
    with (
        receiver(proxy.port, channel, EVENTS) as client,
        database.connect(autocommit=False) as connection,
    ):
        connection.execute(INSERT, [channel, 1, EVENTS])
        connection.execute("SET CONSTRAINTS ALL IMMEDIATE")  # not part of what is measured
        start = time.monotonic()
        connection.commit()
        return client.finished() - start


def benchmark(options: report.Options) -> Report:
    sizes = {SHORT: 10_000, LONG: 300_000 if options.quick else 5_000_000}
    what = f"{EVENTS:,} events in a log of {sizes[LONG]:,} or {sizes[SHORT]:,}"
    sequenced, published = (
        Comparison(f"{what}: {how}", "s", LONG, SHORT, at_most(1.2))
        for how in ("sequence", "sequence and publish")
    )
    found = Report([sequenced, published])
    site_port = free_port()
    with postgres() as server, pushpin(server.directory / "pushpin", site_port) as proxy:
        grip_url = f"{proxy.control_url}?key={SIG_KEY}"
        databases = {name: Database(server, name, GRIP_URL=grip_url) for name in sizes}
        for name, size in sizes.items():
            start = time.monotonic()
            lengthen(databases[name], size, proxy)
            say("log_size", f"{name}: {size} events in {time.monotonic() - start:.0f} s")
        for n in range(options.rounds):
            for name in (LONG, SHORT) if n % 2 else (SHORT, LONG):
                sequenced.add(name, sequence(databases[name]))
        for n in range(options.rounds):
            for name in (LONG, SHORT) if n % 2 else (SHORT, LONG):
                database = databases[name]
                with database.site(site_port), database.publisher():
                    started = time.monotonic()
                    wait_until(partial(pruned, database), timeout=120)
                    fact = f"{name}: seconds of the pruner's first pass over the log"
                    found.facts[fact] = round(time.monotonic() - started, 1)
                    published.add(name, publish(database, proxy))
            ratios = [comparison.ratios[0].rounds[n] for comparison in (sequenced, published)]
            say("log_size", f"round {n + 1}: {ratios[0]:.2f} {ratios[1]:.2f}")
    return found


def pruned(database: Database) -> bool:
    """Whether the publisher's pruner, which reads the whole log once, is idle."""
    return bool(
        database.value(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg_eventstream prune'"
            " AND state = 'idle' AND state_change < clock_timestamp() - interval '0.5 s'"
        )
    )


if __name__ == "__main__":
    report.main("log_size", __doc__, benchmark)
