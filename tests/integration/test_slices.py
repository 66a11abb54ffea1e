"""A backlog is sequenced in slices, in the same order as at once, and each event exactly once."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from django.core.management import call_command
from django.test import override_settings

from pg_eventstream import subscribe
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.publisher.pruner import Pruner
from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database
from tests.support.environment import THOROUGH

SEQUENCE = "SELECT pg_eventstream_sequence()"
SESSIONS = 6

Connection = psycopg.Connection[Any]
SEEDS = range(60 if THOROUGH else 1)


def cut_small(
    database: Database, *, first: int = 7, following: int = 11, page: int = 3, most_open: str = ""
) -> None:
    """Make slices of a few events, with that many open transactions at a time."""
    text: str = database.value(
        "SELECT pg_get_functiondef('pg_eventstream_sequence()'::regprocedure)"
    )
    for constant, old, new in (
        ("first_slice CONSTANT bigint := ", "50000", first),
        ("next_slice  CONSTANT bigint := ", "250000", following),
        ("page        CONSTANT bigint := ", "1000", page),
    ):
        assert constant + old in text
        text = text.replace(constant + old, f"{constant}{new}")
    if most_open:
        start = text.index("most_open := ")
        text = text[:start] + f"most_open := {most_open};" + text[text.index(";", start) + 1 :]
    database.execute(text)


class Senders:
    """Sessions that send in any order and draw their seqs early or late."""

    def __init__(self, database: Database, seed: int, stack: ExitStack) -> None:
        self._random = random.Random(seed)
        self._sessions = [
            stack.enter_context(database.connect(autocommit=False)) for _ in range(SESSIONS)
        ]

    def step(self) -> None:
        session = self._random.choice(self._sessions)
        what = self._random.random()
        if what < 0.15:
            session.commit()
        elif what < 0.2:
            session.rollback()
        elif what < 0.3:
            session.execute("SET CONSTRAINTS ALL IMMEDIATE")  # this draws their seqs
            session.execute("SET CONSTRAINTS ALL DEFERRED")
        elif what < 0.4:
            session.execute("SELECT pg_current_xact_id()")
        else:
            # Sometimes one that is larger than a slice.
            session.execute(
                "INSERT INTO pg_eventstream_event (channel, data)"
                " SELECT 'c' || n %% 3, '' FROM generate_series(1, %s) AS n",
                [self._random.choice([1, 1, 1, 2, 3, 5, 30])],
            )

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def finish(self) -> None:
        for session in self._sessions:
            session.commit()


def waiting(connection: Connection) -> list[int]:
    """The committed events that are not sequenced yet, in the order that they must get."""
    return [
        row[0]
        for row in connection.execute(
            "SELECT event_id FROM pg_eventstream_outbox AS o WHERE NOT EXISTS"
            " (SELECT FROM pg_eventstream_stream AS s WHERE s.event_id = o.event_id)"
            " ORDER BY seq"
        )
    ]


def sequenced(connection: Connection) -> list[int]:
    """All events that have a place, in their order, which has no gaps."""
    rows = connection.execute(
        "SELECT position, channel, eid, event_id FROM pg_eventstream_stream ORDER BY position"
    ).fetchall()
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
    for channel in {row[1] for row in rows}:
        eids = [row[2] for row in rows if row[1] == channel]
        assert eids == list(range(1, len(eids) + 1))
    return [row[3] for row in rows]


def unfinished(connection: Connection) -> bool:
    """Whether a backlog is partly sequenced."""
    row = connection.execute(
        "SELECT until IS NOT NULL FROM pg_eventstream_cursor ORDER BY position DESC LIMIT 1"
    ).fetchone()
    return row == (True,)


@contextmanager
def call(database: Database, how: str) -> Iterator[Connection]:
    with database.connect(autocommit=how != "in a transaction that has written") as connection:
        if how == "beside an old snapshot":
            with database.connect(autocommit=False) as old:
                old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                old.execute("SELECT count(*) FROM pg_eventstream_event")
                yield connection
        else:
            yield connection


@pytest.mark.parametrize(
    "how", ["alone", "in a transaction that has written", "beside an old snapshot", "with sweeps"]
)
@pytest.mark.faults
@pytest.mark.parametrize("seed", SEEDS)
def test_slices_give_the_order_in_which_places_were_drawn(
    database: Database, seed: int, how: str
) -> None:
    cut_small(database, most_open=str(SESSIONS))
    expected: list[int] = []
    most = 0
    with ExitStack() as stack:
        senders = Senders(database, seed, stack)
        caller = stack.enter_context(call(database, how))
        look = stack.enter_context(database.connect())
        sweep = Pruner(stack.enter_context(database.connect()))
        for _ in range(6):
            senders.run(60)
            expected += waiting(look)
            slices = 0
            while True:
                if how == "in a transaction that has written":
                    caller.execute("SELECT pg_current_xact_id()")
                moved = caller.execute(SEQUENCE).fetchone()
                caller.commit()
                assert moved is not None
                if not moved[0]:
                    break
                slices += 1
                if how == "with sweeps":
                    sweep.run_once()
                if not unfinished(look):
                    break
                senders.run(4)  # events that it commits now come after all of the backlog
            assert sequenced(look) == expected
            most = max(most, slices)
        senders.finish()
        expected += waiting(look)
        while database.value(SEQUENCE):
            pass
        assert sequenced(look) == expected
        assert not waiting(look)
    assert most > 3, "there was no backlog"


@pytest.mark.faults
@pytest.mark.parametrize("seed", SEEDS)
def test_no_event_is_lost_or_doubled_with_any_number_of_open_transactions(
    database: Database, seed: int
) -> None:
    """As after a restart with far lower limits, which the database cannot know of."""
    cut_small(database, most_open="0")
    with ExitStack() as stack:
        senders = Senders(database, seed, stack)
        connection = stack.enter_context(database.connect())
        for _ in range(100):
            senders.run(5)
            connection.execute(SEQUENCE)
        senders.finish()
        while connection.execute(SEQUENCE).fetchone() != (0,):
            pass
        assert not waiting(connection)
        assert len(set(sequenced(connection))) == database.value(
            "SELECT count(*) FROM pg_eventstream_event"
        )


def backlog(database: Database) -> None:
    """A backlog of which one slice is sequenced."""
    database.send("a")
    assert database.value(SEQUENCE) == 1
    for _ in range(5):
        database.execute(
            "INSERT INTO pg_eventstream_event (channel, data)"
            " SELECT 'c' || n % 3, '' FROM generate_series(1, 10) AS n"
        )
    assert database.value(SEQUENCE) == 7


def roll_back(database: Database) -> None:
    with database.connect(autocommit=False) as connection:
        assert connection.execute(SEQUENCE).fetchone() == (11,)
        connection.rollback()


def crash(database: Database) -> None:
    database.postgres.kill()
    database.postgres.start()


def forget(database: Database) -> None:
    database.execute("DELETE FROM pg_eventstream_cursor")


def copy(database: Database) -> None:
    database.execute("UPDATE pg_eventstream_cursor SET cluster = cluster + 1")


def load(database: Database) -> None:
    database.execute("UPDATE pg_eventstream_cursor SET cluster = 0")


def migrate_back(database: Database) -> None:
    """Migrate back to the function without slices, and forward again."""
    call_command("migrate", "pg_eventstream", "0005", verbosity=0)
    assert database.value(SEQUENCE) == 43
    database.send("a")
    database.send("a")
    call_command("migrate", "pg_eventstream", verbosity=0)


def lock(database: Database) -> None:
    """One call at a time: the second one waits and sequences the next slice."""
    with database.connect(autocommit=False) as one:
        assert one.execute(SEQUENCE).fetchone() == (11,)
        with database.connect() as two:
            two.execute("SET lock_timeout = '50ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                two.execute(SEQUENCE)


@pytest.mark.parametrize(
    "happens",
    [
        roll_back,
        pytest.param(crash, marks=pytest.mark.alone),
        forget,
        copy,
        load,
        lock,
        migrate_back,
    ],
)
def test_backlog_is_finished_despite_anything_between_two_slices(
    database: Database, happens: Any
) -> None:
    cut_small(database)
    backlog(database)
    with database.connect() as connection:
        expected = [*sequenced(connection), *waiting(connection)]
        assert unfinished(connection)
    happens(database)
    with database.connect() as connection:
        expected += [event for event in waiting(connection) if event not in expected]
        while connection.execute(SEQUENCE).fetchone() != (0,):
            pass
        assert sequenced(connection) == expected
        assert not unfinished(connection)


def test_rows_deleted_by_hand_do_not_end_it(database: Database) -> None:
    cut_small(database)
    backlog(database)
    database.execute("DELETE FROM pg_eventstream_outbox")
    database.send("new")
    assert database.value(SEQUENCE) == 0
    assert database.value(SEQUENCE) == 1


def test_call_that_leaves_something_rings(database: Database) -> None:
    cut_small(database)
    backlog(database)
    with database.connect() as connection:
        connection.execute("LISTEN pg_eventstream")
        while connection.execute(SEQUENCE).fetchone() != (0,):
            assert next(connection.notifies(timeout=5)).channel == "pg_eventstream"
        database.send("a")  # which notifies as well
        next(connection.notifies(timeout=5))
        assert connection.execute(SEQUENCE).fetchone() == (1,)
        assert not list(connection.notifies(timeout=0.1))


def send_at_once(database: Database, events: int) -> None:
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data)"
        " SELECT 'c', n FROM generate_series(1, %s) AS n",
        [events],
    )


@override_settings(EVENTSTREAM_SAFETY_POLL=None, GRIP_URL=None, GRIP_PROXIES=[])
def test_publisher_continues_until_nothing_is_left(database: Database) -> None:
    """It was asleep, and no poll wakes it."""
    cut_small(database)
    publisher = Publisher(Connector("default"))
    thread = threading.Thread(target=publisher.run)
    thread.start()
    try:
        wait_until(
            lambda: publisher._doorbell is not None and publisher._doorbell.state.value == "asleep",
            timeout=20,
        )
        send_at_once(database, 200)
        wait_until(
            lambda: database.value("SELECT count(*) FROM pg_eventstream_stream") == 200, timeout=20
        )
    finally:
        publisher.stop()
        thread.join(20)


@override_settings(EVENTSTREAM_SAFETY_POLL=None)
def test_process_that_streams_directly_continues_until_nothing_is_left(database: Database) -> None:
    cut_small(database)
    database.send("c", "first")
    database.value(SEQUENCE)

    async def receive(count: int) -> list[str]:
        stream = subscribe(["c"], after="earliest")
        data = [(await anext(stream)).data]
        await asyncio.to_thread(send_at_once, database, count)
        return data + [(await anext(stream)).data for _ in range(count)]

    data = asyncio.run(asyncio.wait_for(receive(200), 20))
    assert data == ["first", *map(str, range(1, 201))]
