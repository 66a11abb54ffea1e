"""Clients see events in the order of commits, independent of the order of the INSERTs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import psycopg
import pytest

from tests.support.database import Database
from tests.support.publisher import NewPublisher, PublisherProcess
from tests.support.snapshots import only_hold_a_snapshot
from tests.support.sse_client import OpenStream

WRITERS = 8


class Contention:
    """Writers that insert their event first and then wait for a row in which they count."""

    def __init__(self, database: Database, channel: str) -> None:
        self.database = database
        self.channel = channel
        self.order: dict[str, int] = {}
        """The value of the locked counter, for each event's data."""
        database.execute("INSERT INTO app_counter (name, value) VALUES ('contended', 0)")

    def run(self, transactions: int) -> None:
        threads = [
            threading.Thread(target=self._write, args=[n, transactions // WRITERS])
            for n in range(WRITERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(self.order) == transactions // WRITERS * WRITERS

    def _write(self, writer: int, transactions: int) -> None:
        with self.database.connect(autocommit=False) as connection:
            for n in range(transactions):
                data = f"{writer}-{n}"
                connection.execute(
                    "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s)",
                    [self.channel, data],
                )
                row = connection.execute(
                    "UPDATE app_counter SET value = value + 1 RETURNING value"
                ).fetchone()
                connection.commit()
                assert row
                self.order[data] = row[0]


def inversions(values: list[int]) -> int:
    return sum(1 for before, after in itertools.pairwise(values) if before > after)


def test_clients_see_commit_order(
    database: Database,
    publisher: PublisherProcess,
    stream: OpenStream,
    channel: str,
) -> None:
    client = stream(channel).wait_open()
    contention = Contention(database, channel)
    contention.run(4000)
    received = client.wait_count(4000, timeout=60)
    assert inversions([contention.order[event.data] for event in received]) == 0
    assert [event.eids[channel] for event in received] == list(range(1, 4001))


def test_order_by_id_would_not_do(
    database: Database,
    publisher: PublisherProcess,
    stream: OpenStream,
    channel: str,
) -> None:
    """The same with a sequence in the order of the events' ids, to show that the test can fail."""
    definition = database.value(
        "SELECT pg_get_functiondef('pg_eventstream_sequence()'::regprocedure)"
    )
    assert definition.count("ORDER BY seq") == 2
    database.execute(definition.replace("ORDER BY seq", "ORDER BY event_id"))
    client = stream(channel).wait_open()
    contention = Contention(database, channel)
    contention.run(800)
    received = client.wait_count(800, timeout=60)
    assert inversions([contention.order[event.data] for event in received]) > 0


def test_events_of_a_transaction_keep_their_order(
    database: Database,
    publisher: PublisherProcess,
    stream: OpenStream,
    channel: str,
) -> None:
    client = stream(channel).wait_open()
    with database.connect(autocommit=False) as connection:
        for n in range(100):
            connection.execute(
                "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s), (%s, %s)",
                [channel, f"{n}a", channel, f"{n}b"],
            )
            database.send(channel, f"other {n}")  # committed in between by another session
        connection.commit()
    received = [event.data for event in client.wait_count(300)]
    assert [data for data in received if not data.startswith("other")] == [
        f"{n}{half}" for n in range(100) for half in "ab"
    ]
    assert [data for data in received if data.startswith("other")] == [
        f"other {n}" for n in range(100)
    ]
    assert received.index("99b") == 299  # the transaction committed last


def send_and_stay_open(connection: psycopg.Connection[object], channel: str) -> None:
    connection.execute(
        "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, 'late')", [channel]
    )


@pytest.mark.parametrize(
    ("begin", "late"), [(send_and_stay_open, ["late"]), (only_hold_a_snapshot, [])]
)
def test_open_transaction_delays_no_other_event(
    database: Database,
    new_publisher: NewPublisher,
    stream: OpenStream,
    channel: str,
    begin: Callable[[psycopg.Connection[object], str], None],
    late: list[str],
) -> None:
    client = stream(channel).wait_open()
    with database.connect(autocommit=False) as connection:
        # It is committed before the publisher starts, and no poll delivers the others.
        begin(connection, channel)
        new_publisher(PG_EVENTSTREAM_TEST_SAFETY_POLL="off").lead()
        for n in range(200):
            database.send(channel, str(n))
        on_time = [str(n) for n in range(200)]
        assert [event.data for event in client.wait_count(200)] == on_time
        connection.commit()
        database.send(channel, "last")
    expected = {*on_time, *late, "last"}
    assert {event.data for event in client.wait_count(len(expected))} == expected
