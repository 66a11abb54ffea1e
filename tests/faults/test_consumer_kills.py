"""Each event is handled once and in order, whatever process or session ends, and whenever."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psycopg
import pytest

from pg_eventstream import send_events
from pg_eventstream.servers.processes import children, wait_until
from tests.support.chance import seeded
from tests.support.consumers import ConsumerProcess, Handled, declared
from tests.support.database import Database
from tests.support.environment import THOROUGH

pytestmark = [pytest.mark.faults]

CHANNELS = 12
KILLS = 100 if THOROUGH else 12


def workers(process: ConsumerProcess) -> list[int]:
    """The processes that the command has started."""
    return children(process.pid)


def expected(count: int) -> dict[str, list[int]]:
    """The numbers of so many events by channel."""
    eids: dict[str, list[int]] = {}
    for n in range(count):
        channel = f"c{n % CHANNELS}"
        eids.setdefault(channel, []).append(len(eids.get(channel, [])) + 1)
    return eids


@contextmanager
def sending(database: Database, pause: float) -> Iterator[Callable[[], int]]:
    """Send events until the block ends. Yields what returns the number sent."""
    stopping = threading.Event()
    sent = 0

    def send() -> None:
        nonlocal sent
        with database.connect(application_name="the sender") as connection:
            while not stopping.wait(pause):
                connection.execute(
                    "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, '1')",
                    [f"c{sent % CHANNELS}"],
                )
                sent += 1

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield lambda: sent
    finally:
        stopping.set()
        thread.join()


def kill_a_worker(processes: list[ConsumerProcess], chance: random.Random) -> None:
    pids = [pid for process in processes if process.running for pid in workers(process)]
    if pids:
        kill(chance.choice(pids))


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_a_parent(
    processes: list[ConsumerProcess], chance: random.Random, environment: dict[str, str]
) -> None:
    """Kill one, and start another."""
    os.kill(chance.choice([p for p in processes if p.running]).pid, signal.SIGKILL)
    processes.append(ConsumerProcess("--processes", "2", environment=environment))
    processes[-1].start()


def end_a_session(
    processes: list[ConsumerProcess], chance: random.Random, database: Database
) -> None:
    """Of handlers and of locks alike."""
    pids = database.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND application_name <> 'the sender'"
    )
    if pids:
        database.execute("SELECT pg_terminate_backend(%s)", [chance.choice(pids)[0]])


@pytest.mark.parametrize("batch", [1, pytest.param(25, marks=pytest.mark.thorough)])
def test_events_are_handled_once_in_order_while_processes_are_killed(
    database: Database, batch: int
) -> None:
    """At random moments, which are all of those between reading, handling and committing."""
    handled = Handled(database)
    chance = seeded()
    declaration = {
        "name": "stock",
        "handler": "record_slowly",
        "start": "earliest",
        "batch": batch,
        # Every kill can count as an attempt.
        "retry": {"attempts": 1000},
    }
    environment = declared(declaration)
    processes = [ConsumerProcess("--processes", "2", environment=environment) for _ in range(2)]
    for process in processes:
        process.start()
    processes[0].wait_for_log(": running")
    try:
        with sending(database, 0.004) as sent:
            for n in range(KILLS):
                time.sleep(chance.uniform(0.02, 0.5))
                match n % 4:
                    case 3:
                        kill_a_parent(processes, chance, environment)
                    case 2:
                        end_a_session(processes, chance, database)
                    case _:
                        kill_a_worker(processes, chance)
        total = sent()
        handled.wait("stock", total, timeout=120)
    finally:
        for process in processes:
            process.stop(timeout=30)
    assert handled.eids("stock") == expected(total)
    assert database.fetch("SELECT FROM pg_eventstream_parked") == []


@pytest.mark.alone
def test_standby_takes_over_within_two_seconds(database: Database) -> None:
    handled = Handled(database)
    declaration = {"name": "stock", "handler": "record", "start": "earliest"}
    processes = [ConsumerProcess(environment=declared(declaration)).begin() for _ in range(2)]

    def holders() -> set[str]:
        return {
            holder
            for (holder,) in database.fetch("SELECT DISTINCT holder FROM pg_eventstream_slot")
        }

    try:
        wait_until(lambda: len(holders()) == 2, timeout=20)
        os.kill(processes[0].pid, signal.SIGKILL)
        for pid in workers(processes[0]):
            kill(pid)
        killed_at = time.monotonic()
        send_events([(f"c{n % CHANNELS}", "message", n) for n in range(60)])
        handled.wait("stock", 60)
        took = time.monotonic() - killed_at
    finally:
        for process in processes:
            process.stop(timeout=30)
    assert handled.eids("stock") == expected(60)
    assert took < 2


def test_processes_end_with_their_parent_and_are_replaced_without_it(database: Database) -> None:
    declaration = {"name": "stock", "handler": "record", "start": "earliest"}
    process = ConsumerProcess("--processes", "2", environment=declared(declaration)).begin()
    try:
        wait_until(lambda: len(workers(process)) == 2, timeout=10)
        first = workers(process)
        os.kill(first[0], signal.SIGKILL)
        wait_until(
            lambda: len(workers(process)) == 2 and first[0] not in workers(process), timeout=10
        )
        left = workers(process)
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in left), timeout=20)
    finally:
        process.stop()


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_a_handler_finish(database: Database, number: signal.Signals) -> None:
    handled = Handled(database)
    declaration = {"name": "stock", "handler": "obey", "start": "earliest"}
    send_events([("c", "message", {"sleep": 1.5, "recorded": True}), ("c", "message", 2)])
    process = ConsumerProcess(environment=declared(declaration)).begin()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"
    wait_until(lambda: database.value(waiting) == 1, timeout=20)
    process.stop(number, timeout=20)
    assert process.returncode == 0
    assert handled.eids("stock") == {"c": [1]}
    assert database.fetch("SELECT FROM pg_eventstream_slot WHERE holder <> ''") == []
    with ConsumerProcess(environment=declared(declaration)):
        handled.wait("stock", 2)
    assert database.fetch("SELECT attempt FROM handled") == [(1,), (1,)]


@pytest.mark.thorough
def test_restart_of_the_database_neither_loses_nor_repeats(database: Database) -> None:
    handled = Handled(database)
    declaration = {"name": "stock", "handler": "record_slowly", "start": "earliest"}
    send_events([(f"c{n % CHANNELS}", "message", n) for n in range(600)])
    with ConsumerProcess(environment=declared(declaration)) as process:
        handled.wait("stock", 50)
        database.postgres.stop()
        process.wait_for_log("connecting again")
        database.postgres.start()
        handled.wait("stock", 600, timeout=60)
    assert handled.eids("stock") == expected(600)
    assert database.fetch("SELECT FROM handled WHERE attempt > 1") == []
    assert "attempt" not in process.log


@pytest.mark.thorough
def test_slots_are_shared_among_processes_that_come_and_go(database: Database) -> None:
    declaration = {"name": "stock", "handler": "record", "start": "earliest"}

    def shares() -> list[int]:
        rows = database.fetch(
            """
            SELECT count(*) FROM pg_locks
             WHERE locktype = 'advisory' AND classid = 'pg_eventstream_event'::regclass
               AND objid::bigint >= 64 AND (objid::bigint - 64) % 32 < 16
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
             GROUP BY pid ORDER BY 1
            """
        )
        return [count for (count,) in rows]

    first = ConsumerProcess(environment=declared(declaration)).begin()
    second = ConsumerProcess("--processes", "3", environment=declared(declaration))
    try:
        wait_until(lambda: shares() == [16], timeout=20)
        second.start()
        wait_until(lambda: shares() == [4, 4, 4, 4], timeout=20)
        first.stop(timeout=20)
        wait_until(lambda: shares() == [5, 5, 6] or shares() == [4, 6, 6], timeout=20)
    finally:
        first.stop(timeout=20)
        second.stop(timeout=20)
    assert shares() == []


_HAS_LOOKED = """
    SELECT count(*) > 0 FROM pg_stat_activity
     WHERE application_name = 'pg_eventstream consumers' AND datname = current_database()
       AND query_start > %s + interval '1.2 s'
"""


def test_consumers_sequence_only_where_no_publisher_does(database: Database) -> None:
    """Through the leader's lock; without one, they do it outside of handlers' transactions."""
    handled = Handled(database)
    declaration = {"name": "stock", "handler": "record", "start": "earliest"}
    with ConsumerProcess(environment=declared(declaration)):
        send_events([("c", "message", 1)])
        handled.wait("stock", 1)
        with psycopg.connect(database.dsn, autocommit=True) as leader:
            leader.execute(
                "SELECT pg_advisory_lock('pg_eventstream_event'::regclass::oid::int4, 2)"
            )
            send_events([("c", "message", 2)])
            # It has looked again, twice and more.
            (sent_at,) = leader.execute("SELECT clock_timestamp()").fetchone() or (None,)
            wait_until(lambda: database.value(_HAS_LOOKED, [sent_at]), timeout=20)
            assert handled.count("stock") == 1
            leader.execute("SELECT pg_eventstream_sequence()")
            handled.wait("stock", 2)
