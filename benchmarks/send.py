"""What sending costs the sender: committed transactions per second.

In SQL (pgbench, one INSERT per transaction, 1, 16 and 64 clients), compared with the same INSERT
into an equal table without a trigger:

    pg_eventstream         while a publisher is awake, as it is under load
    SET search_path        the trigger's function with this clause instead of qualified names
    publisher asleep       no publisher is awake, so each commit sends a notification
    publisher beside it    a publisher runs on the same processors
    naive NOTIFY           a trigger that notifies with the payload, as is often done
    pgpubsub               django-pgpubsub: its trigger for notifications that are handled once
    without constraints    a table that accepts any text, to see what checking the text costs

From Django (`send_event` in `atomic()`, 1 and 8 processes, all on one channel or each on a separate
one), compared with a bare INSERT in `atomic()` through the same Django connection, and with
django-eventstream (events stored in the same PostgreSQL) and django-pgpubsub.

    python -m benchmarks.send [--quick] [--rounds 3]
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from pg_eventstream.postgres.locks import BELL_LOCK, LOCK_SPACE
from pg_eventstream.servers.postgres import Postgres

from . import report
from .report import Comparison, Options, Report, at_least, say
from .servers import OURS, PEER, PUBSUB, Database, postgres

_TABLES = """
CREATE TABLE bare (LIKE pg_eventstream_event INCLUDING ALL);
CREATE TABLE plain (
    LIKE pg_eventstream_event INCLUDING DEFAULTS INCLUDING IDENTITY INCLUDING INDEXES);
CREATE TABLE naive (LIKE pg_eventstream_event INCLUDING ALL);
CREATE FUNCTION naive_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('naive', NEW.data);
    RETURN NULL;
END $$;
CREATE TRIGGER naive AFTER INSERT ON naive FOR EACH ROW EXECUTE FUNCTION naive_notify();
"""
_BARE, _NAIVE = "bare INSERT", "naive NOTIFY"
_ASLEEP, _BESIDE, _PLAIN = "publisher asleep", "publisher beside it", "without constraints"
_PINNED = "SET search_path"


@contextmanager
def search_path_set(database: Database) -> Iterator[None]:
    """The usual way to make names in a SECURITY DEFINER function safe."""
    function = "ALTER FUNCTION pg_eventstream_enqueue()"
    with database.connect() as connection:
        connection.execute(f"{function} SET search_path = pg_catalog, public, pg_temp")
        yield
        connection.execute(f"{function} RESET search_path")


@contextmanager
def bell_held(database: Database) -> Iterator[None]:
    """Hold the bell, as an awake publisher does."""
    with database.connect() as connection:
        connection.execute(f"SELECT pg_advisory_lock({LOCK_SPACE}, {BELL_LOCK})")
        yield


# In SQL


def in_sql(
    options: Options, server: Postgres, ours: Database, pubsub: Database, clients: int
) -> Comparison:
    at_bare, at_naive = (at_least(0.8), at_least(2.5)) if clients == 16 else (None, None)
    title = f"SQL, {clients} client{'s' if clients > 1 else ''}"
    found = Comparison(
        title, "commits/s", OURS, _BARE, at_bare, {_PINNED: None, _NAIVE: at_naive, PUBSUB: None}
    )

    def per_second(table: str, database: Database = ours) -> float:
        script = server.directory / f"{table}.sql"
        script.write_text(
            f"INSERT INTO {table} (channel, type, data)"
            """ VALUES ('room', 'message', '{"text": "a line of a chat"}')"""
        )
        output = subprocess.run(
            [
                server.program("pgbench"),
                *("-n", "-f", script, "-c", str(clients), "-j", "2"),
                *("-T", "1" if options.quick else "2", "-M", "prepared", database.dsn),
            ],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        tps = re.search(r"tps = ([\d.]+)", output)
        assert tps, output
        return float(tps[1])

    for n in range(options.rounds):
        figures: dict[str, float] = {}
        with bell_held(ours):
            for way in (_BARE, OURS) if n % 2 else (OURS, _BARE):
                figures[way] = per_second("bare" if way == _BARE else "pg_eventstream_event")
            with search_path_set(ours):
                figures[_PINNED] = per_second("pg_eventstream_event")
        figures[_NAIVE] = per_second("naive")
        figures[_PLAIN] = per_second("plain")
        figures[PUBSUB] = per_second("project_message", pubsub)
        figures[_ASLEEP] = per_second("pg_eventstream_event")
        with ours.publisher():
            figures[_BESIDE] = per_second("pg_eventstream_event")
        for way, figure in figures.items():
            found.add(way, figure)
        say("send", f"{title}, round {n + 1}: {format_rates(figures)}")
    return found


def format_rates(figures: dict[str, float]) -> str:
    return ", ".join(f"{way} {figure:,.0f}/s" for way, figure in figures.items())


# From Django


@dataclass(frozen=True, slots=True)
class Sent:
    per_second: float
    cpu: float  # microseconds per call


def send_from(
    database: Database, way: str, processes: int, one_channel: bool, seconds: float
) -> Sent:
    with ExitStack() as stack:
        senders = []
        for n in range(processes):
            channel = "room" if one_channel else f"room-{n}"
            sender = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.sender", way, channel],
                env=database.environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            senders.append(stack.enter_context(sender))
        for sender in senders:
            assert sender.stdout is not None
            assert sender.stdout.readline() == "ready\n"
        for sender in senders:
            assert sender.stdin is not None
            sender.stdin.write(f"{seconds}\n")
            sender.stdin.flush()
        count, cpu = 0, 0.0
        for sender in senders:
            assert sender.stdout is not None
            sent, took = sender.stdout.readline().split()
            count += int(sent)
            cpu += float(took)
    return Sent(count / seconds, cpu / count * 1e6)


def from_django(
    options: Options, databases: dict[str, Database], processes: int
) -> list[Comparison]:
    title = f"Django, {processes} process{'es' if processes > 1 else ''}"
    own, one = f"{OURS}, own channels", OURS
    goal = at_least(8) if processes == 8 else None
    found = Comparison(
        f"{title}, one channel", "commits/s", one, _BARE, at_least(0.9),
        {PEER: goal, PUBSUB: None, own: at_least(0.95)},
    )  # fmt: skip
    added = Comparison(f"{title}, processor time of the sender", "µs per call", one, _BARE)
    seconds = 1.5 if options.quick else 3
    for n in range(options.rounds):
        measured: dict[str, Sent] = {}
        with bell_held(databases[OURS]):
            ways = [(_BARE, OURS, True), (one, OURS, True), (own, OURS, False)]
            for name, package, one_channel in ways if n % 2 else reversed(ways):
                way = _BARE if name == _BARE else package
                measured[name] = send_from(databases[package], way, processes, one_channel, seconds)
        for package in (PEER, PUBSUB):
            measured[package] = send_from(databases[package], package, processes, True, seconds)
        for name, sent in measured.items():
            found.add(name, sent.per_second)
            added.add(name, sent.cpu)
        figures = {way: sent.per_second for way, sent in measured.items()}
        say("send", f"{title}, round {n + 1}: {format_rates(figures)}")
    return [found, added]


def benchmark(options: Options) -> Report:
    found = Report([])
    with postgres() as server:
        databases = {name: Database(server, name, name) for name in (OURS, PEER, PUBSUB)}
        with databases[OURS].connect() as connection:
            connection.execute(_TABLES)
        for clients in (1, 16, 64):
            found.comparisons.append(
                in_sql(options, server, databases[OURS], databases[PUBSUB], clients)
            )
        for processes in (1, 8):
            found.comparisons += from_django(options, databases, processes)
    return found


if __name__ == "__main__":
    report.main("send", __doc__, benchmark)
