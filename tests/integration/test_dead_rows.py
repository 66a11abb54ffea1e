"""Pruned rows cost nothing, even while a held snapshot prevents vacuum from removing them."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from django.db import connection as django_connection
from django.test import override_settings

from pg_eventstream import get_current_event_id, send_event
from pg_eventstream.consumers import Consumer, Retry, checkpoints, operations, reader
from pg_eventstream.consumers.progress import read_consumers
from pg_eventstream.consumers.runner import Runner
from pg_eventstream.consumers.waiting import wait
from pg_eventstream.grip.proxy import Proxy
from pg_eventstream.limits import LIMITS
from pg_eventstream.liveness import _check_state
from pg_eventstream.operate import state
from pg_eventstream.postgres import connector
from pg_eventstream.postgres.slots import SLOTS, slot_of
from pg_eventstream.postgres.watchdog import WatchedConnection
from pg_eventstream.publisher import daemon, feed
from pg_eventstream.publisher.pruner import Pruner
from pg_eventstream.streams import hub, replay
from tests.support.database import Database

#: The dead rows of one channel, which is pruned completely, and of a whole table.
PRUNED = 20_000
PROXY = Proxy({"control_uri": "http://127.0.0.1:1"})


class PagesRead:
    """Counts the pages that all statements of a session read from now on."""

    def __init__(self, session: psycopg.Connection[Any]) -> None:
        self._plans: list[str] = []
        session.add_notice_handler(lambda notice: self._plans.append(notice.message_primary or ""))
        session.execute(
            "LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0;"
            " SET auto_explain.log_analyze = on; SET auto_explain.log_buffers = on;"
            " SET auto_explain.log_timing = off; SET auto_explain.log_level = notice"
        )
        self._plans.clear()

    @property
    def count(self) -> int:
        assert self._plans
        pages = 0
        for plan in self._plans:
            # The topmost node includes the pages that its children read.
            found = re.search(r"Buffers: shared(?: hit=(\d+))?(?: read=(\d+))?", plan)
            pages += sum(int(number or 0) for number in found.groups()) if found else 0
        return pages


def in_django(work: Callable[[], object]) -> int:
    django_connection.ensure_connection()
    pages = PagesRead(django_connection.connection)
    try:
        work()
    finally:
        django_connection.close()
    return pages.count


def sequence(database: Database) -> int:
    with database.connect() as session:
        session.execute("SELECT pg_eventstream_sequence()")  # plans the function's statements
        database.send("pruned")
        pages = PagesRead(session)
        assert session.execute("SELECT pg_eventstream_sequence()").fetchone() == (1,)
        return pages.count


def resume(database: Database) -> int:
    return in_django(lambda: replay.replay({"pruned": PRUNED}))


def resume_from_what_is_pruned(database: Database) -> int:
    return in_django(lambda: replay.replay({"pruned": 5}))


def read_from_the_earliest(database: Database) -> int:
    return in_django(lambda: replay.replay({"pruned": replay.EARLIEST}))


def find_the_current_id(database: Database) -> int:
    return in_django(lambda: get_current_event_id(["pruned"]))


def follow(database: Database) -> int:
    reader = hub._Reader(hub.Hub("default"))
    with database.connect() as session:
        pages = PagesRead(session)
        reader._begin(session)
        assert reader.position == PRUNED
        reader._read_page(session)
        return pages.count


def publish(database: Database) -> int:
    work = feed.Feed(PROXY, connector.Connector("default"), threading.Event())
    work._connect()
    assert work._connection is not None
    pages = PagesRead(work._connection)
    work._read_page()
    work.close()
    return pages.count


def register(database: Database) -> int:
    with database.connect() as session:
        pages = PagesRead(session)
        daemon.register(session, "me", [PROXY])
        return pages.count


def look_whether_a_publisher_runs(database: Database) -> int:
    with override_settings(GRIP_URL="http://127.0.0.1:1"):
        return in_django(_check_state)


class Counted(connector.Connector):
    """Counts the pages that its connection reads."""

    pages: PagesRead

    def connect(self, role: str, *, patience: float = math.inf) -> WatchedConnection:
        session = super().connect(role, patience=patience)
        object.__setattr__(self, "pages", PagesRead(session))
        return session


def read_the_state(database: Database) -> int:
    with override_settings(GRIP_URL="http://127.0.0.1:1"):
        counted = Counted("default")
        state.read_state(counted)
        return counted.pages.count


WORK = [
    sequence,
    resume,
    resume_from_what_is_pruned,
    read_from_the_earliest,
    find_the_current_id,
    follow,
    publish,
    register,
    look_whether_a_publisher_runs,
    read_the_state,
]


@pytest.fixture
def pruned(database: Database) -> Iterator[Database]:
    """Everything that a proxy has received is pruned, and vacuum can remove none of it."""
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data)"
        " SELECT 'pruned', '' FROM generate_series(1, %s)",
        [PRUNED],
    )
    with database.connect(autocommit=False) as old, database.connect() as session:
        session.execute("SELECT pg_eventstream_sequence()")
        daemon.register(session, "me", [PROXY])
        session.execute("UPDATE pg_eventstream_proxy SET position = %s", [PRUNED])
        session.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '2 days'")
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM pg_eventstream_event")
        assert Pruner(session).run_once() == PRUNED
        yield database


@pytest.mark.parametrize("work", WORK)
def test_what_is_pruned_and_not_vacuumed_is_not_walked_over(
    pruned: Database, work: Callable[[Database], int]
) -> None:
    # The state asks much more than the others, and reads about 360 pages of an empty database.
    assert work(pruned) < (450 if work is read_the_state else 300)


# Consumers

STOCK = Consumer("stock", print, (), (), "earliest", Retry(), "park", 1, None)


def in_session(database: Database, work: Callable[[psycopg.Connection[Any]], object]) -> int:
    with database.connect() as session:
        pages = PagesRead(session)
        work(session)
        return pages.count


def consumer_id(database: Database) -> int:
    return int(database.value("SELECT id FROM pg_eventstream_consumer"))


def read_a_page(database: Database) -> int:
    one = consumer_id(database)
    with database.connect() as session:
        reader.read_page(session, STOCK, one, PRUNED, range(SLOTS))  # plans the statements
        pages = PagesRead(session)
        reader.read_page(session, STOCK, one, PRUNED, range(SLOTS))
        return pages.count


def take_slots(database: Database) -> int:
    one = consumer_id(database)
    return in_session(database, lambda s: checkpoints.take(s, one, range(SLOTS), "here:1/a"))


def move_a_checkpoint(database: Database) -> int:
    one = consumer_id(database)
    move = checkpoints.Move(SLOT, 0, PRUNED, PRUNED + 1)

    def work(session: psycopg.Connection[Any]) -> None:
        assert checkpoints.begin_moving(session, one, [move], 0)
        checkpoints.commit(session)

    return in_session(database, work)


def ask_whether_all_is_handled(database: Database) -> int:
    return in_django(lambda: wait(STOCK, 0))


def handle_an_event(database: Database) -> int:
    """All that a process does for it."""
    one = consumer_id(database)
    send_event("pruned", "message", 1)
    database.execute("SELECT pg_eventstream_sequence()")
    runner = Runner(STOCK, one, "default", "here:1/a", LIMITS)

    def work() -> None:
        runner.grant(range(SLOTS))
        while runner.step() == 0:
            pass
        assert runner.handled == 1

    return in_django(work)


def list_consumers(database: Database) -> int:
    return in_session(database, lambda session: read_consumers(session, {}))


def pause_a_consumer(database: Database) -> int:
    return in_django(lambda: operations.pause("default", "stock"))


def reset_a_consumer(database: Database) -> int:
    # The earliest event is searched from the lower end of the stream, which is not done often.
    return in_django(lambda: operations.reset("default", "stock", "latest"))


def prune_beside_a_consumer(database: Database) -> int:
    send_event("pruned", "message", 1)
    with database.connect() as session:
        session.execute("SELECT pg_eventstream_sequence()")
        pruner = Pruner(session)
        pruner.run_once()
        pages = PagesRead(session)
        pruner.run_once()
        return pages.count


#: In this order on one database.
OF_CONSUMERS = [
    read_a_page,
    take_slots,
    ask_whether_all_is_handled,
    list_consumers,
    prune_beside_a_consumer,
    move_a_checkpoint,
    handle_an_event,
    pause_a_consumer,
    reset_a_consumer,
]
SLOT = slot_of("pruned")
#: A process that takes slots reads each checkpoint 16 times; others have more to look at, or to
#: plan.
MOST = {
    "take_slots": 1200,
    "handle_an_event": 2500,
    "reset_a_consumer": 600,
    "prune_beside_a_consumer": 800,
}
#: As a consumer does that handles so many events, each in a transaction.
MOVE = f"""
    DO $$ BEGIN
        UPDATE pg_eventstream_checkpoint SET position = 0 WHERE slot = {SLOT};
        FOR i IN 1 .. {PRUNED} LOOP
            UPDATE pg_eventstream_checkpoint SET position = i WHERE slot = {SLOT}
               AND consumer_id = (SELECT id FROM pg_eventstream_consumer) AND position = i - 1
               AND epoch = 0;
        END LOOP;
    END $$
"""


def test_checkpoints_that_were_moved_and_not_vacuumed_are_not_walked_over(pruned: Database) -> None:
    with pruned.connect() as session:
        checkpoints.register(session, STOCK)
    pruned.execute(MOVE)
    pages = {work.__name__: work(pruned) for work in OF_CONSUMERS}
    assert {name: read for name, read in pages.items() if read > MOST.get(name, 400)} == {}
