"""Breaks consumers for real. Each breakage yields the environment of the status command."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pg_eventstream.servers.processes import wait_until
from tests.support.breakages import NO_PROXY, Environment
from tests.support.consumers import ConsumerProcess, Handled, declared
from tests.support.database import Database

#: A consumer that does what its events say.
STOCK = {"name": "stock", "handler": "obey", "start": "earliest", "channels": ["orders"]}
ONCE = {"attempts": 1}
LATER = {"attempts": 5, "backoff": 1000, "longest": 1000}


def code(*consumers: dict[str, Any]) -> Environment:
    """The environment of processes whose code declares these consumers."""
    return {**NO_PROXY, **declared(*consumers)}


@contextmanager
def running(database: Database, *consumers: dict[str, Any]) -> Iterator[ConsumerProcess]:
    """A process that runs these, and has handled an event with each."""
    handled = Handled(database)
    process = ConsumerProcess(environment=declared(*consumers))
    database.send("orders")
    with process:
        for consumer in consumers:
            handled.wait(consumer["name"], 1)
        yield process


def order(database: Database, **what: Any) -> None:
    """Send an event that makes the handler do something."""
    database.send("orders", json.dumps(what))


def wait_for_slot(database: Database, condition: str) -> None:
    query = f"SELECT count(*) FROM pg_eventstream_slot WHERE {condition}"
    wait_until(lambda: database.value(query) > 0, timeout=30)


def worker_pid(database: Database) -> int:
    holder = database.value("SELECT max(holder) FROM pg_eventstream_slot")
    return int(holder.partition(":")[2].partition("/")[0])


@contextmanager
def never_run(database: Database) -> Iterator[Environment]:
    yield code(STOCK)


@contextmanager
def killed(database: Database) -> Iterator[Environment]:
    with running(database, STOCK) as process:
        process.kill()
        held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid > 64"
        wait_until(lambda: database.value(held) == 0, timeout=30)
    order(database)
    yield code(STOCK)


@contextmanager
def suspended(database: Database) -> Iterator[Environment]:
    with running(database, STOCK):
        pid = worker_pid(database)
        os.kill(pid, signal.SIGSTOP)
        try:
            # A minute passes.
            database.execute("UPDATE pg_eventstream_slot SET heartbeat = now() - interval '1 min'")
            yield code(STOCK)
        finally:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def handler_hangs(database: Database) -> Iterator[Environment]:
    with running(database, STOCK):
        order(database, sleep=300)
        yield code(STOCK)
        os.kill(worker_pid(database), signal.SIGKILL)


@contextmanager
def slow(database: Database) -> Iterator[Environment]:
    """It has handled the first of some events that were sent two minutes ago."""
    with running(database, STOCK):
        with database.connect() as session, session.transaction():
            session.execute("SELECT pg_advisory_xact_lock('pg_eventstream_event'::regclass::oid"
                            "::int4, 3)")  # fmt: skip
            for _ in range(5):
                session.execute(
                    "INSERT INTO pg_eventstream_event (channel, data) VALUES ('orders', %s)",
                    ['{"sleep": 3}'],
                )
            session.execute("SET CONSTRAINTS ALL IMMEDIATE")
            session.execute(
                "UPDATE pg_eventstream_outbox SET committed_at = now() - interval '2 min'"
            )
        yield code(STOCK)


@contextmanager
def retried(database: Database) -> Iterator[Environment]:
    stock = {**STOCK, "retry": LATER}
    with running(database, stock):
        order(database, fail="no stock")
        wait_for_slot(database, "failing IS NOT NULL")
        yield code(stock)


@contextmanager
def stopped(database: Database) -> Iterator[Environment]:
    stock = {**STOCK, "retry": ONCE, "on_failure": "stop"}
    with running(database, stock):
        order(database, fail="no stock")
        wait_for_slot(database, "stopped")
        yield code(stock)


@contextmanager
def missed(database: Database) -> Iterator[Environment]:
    with running(database, STOCK):
        database.execute("UPDATE pg_eventstream_slot SET lost = 1000000")
        order(database)
        wait_for_slot(database, "stopped")
        yield code(STOCK)


@contextmanager
def restored_from_a_backup(database: Database) -> Iterator[Environment]:
    with running(database, STOCK):
        pass
    database.execute("UPDATE pg_eventstream_checkpoint SET position = 1000000")
    with ConsumerProcess(environment=declared(STOCK)):
        wait_for_slot(database, "stopped")
        yield code(STOCK)


@contextmanager
def parked(database: Database) -> Iterator[Environment]:
    stock = {**STOCK, "retry": ONCE}
    with running(database, stock) as process:
        order(database, fail="no stock")
        process.wait_for_log("is parked")
        yield code(stock)


@contextmanager
def removed_from_the_code(database: Database) -> Iterator[Environment]:
    with running(database, STOCK):
        pass
    yield NO_PROXY


@contextmanager
def paused_for_days(database: Database) -> Iterator[Environment]:
    with paused(database) as environment:
        order(database)
        database.execute("SELECT pg_eventstream_sequence()")
        database.execute(
            "UPDATE pg_eventstream_stream SET committed_at = now() - interval '2 days'"
            " WHERE position = 2"
        )
        yield environment


@contextmanager
def renamed(database: Database) -> Iterator[Environment]:
    store = {**STOCK, "name": "store"}
    with running(database, store):
        database.execute("UPDATE pg_eventstream_consumer SET former_names = '{stock}'")
        yield code(STOCK, store)


@contextmanager
def paused(database: Database) -> Iterator[Environment]:
    with running(database, STOCK):
        database.execute("UPDATE pg_eventstream_consumer SET paused = true")
        yield code(STOCK)


@contextmanager
def code_does_not_import(database: Database) -> Iterator[Environment]:
    with running(database, STOCK):
        yield {**NO_PROXY, "PG_EVENTSTREAM_TEST_CONSUMERS": '[{"handler": "obey"}]'}
