"""Very many events and very many channels."""

from __future__ import annotations

import time

import pytest

from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database
from tests.support.environment import THOROUGH
from tests.support.faults import wait_for_waiting
from tests.support.publisher import NewPublisher, PublisherProcess
from tests.support.sse_client import OpenStream

EVENTS = 10_000_000 if THOROUGH else 150_000
#: Of each of ten thousand channels.
EACH = 10 if THOROUGH else 3
TRANSACTIONS = EVENTS // 100
#: For any number of events.
FIRST_WITHIN = 3.0
#: The memory of a publisher without a backlog is about 50 MB.
MEMORY_MB = 160

#: Like the trigger at COMMIT, which takes ten times as long.
_FILL = """
    WITH sent AS (
        INSERT INTO pg_eventstream_event (channel, data)
        SELECT '{channel}-' || n % 1000, 'event ' || n
          FROM generate_series({first}, {last}) AS n RETURNING id, channel
    )
    INSERT INTO pg_eventstream_outbox (xid, event_id, channel)
    SELECT pg_current_xact_id(), id, channel FROM sent
"""
_FILL_OFTEN = """
    DO $$ BEGIN
        FOR i IN 0 .. {transactions} - 1 LOOP
            {fill};
            COMMIT;
        END LOOP;
    END $$
"""


def fill(database: Database, channel: str, transactions: int) -> None:
    """Leave a backlog of one or of many transactions."""
    each = EVENTS // transactions
    with database.connect() as connection:
        connection.execute("SET session_replication_role = replica; SET synchronous_commit = off")
        connection.execute(
            _FILL_OFTEN.format(
                transactions=transactions,
                fill=_FILL.format(
                    channel=channel, first=f"i * {each}", last=f"i * {each} + {each - 1}"
                ),
            )
        )


def position(database: Database) -> int:
    return int(database.value("SELECT max(position) FROM pg_eventstream_cursor"))


@pytest.mark.alone
@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "transactions", [pytest.param(1, marks=pytest.mark.thorough), TRANSACTIONS]
)
def test_backlog_of_very_many_events_starts_at_once_and_in_bounded_memory(
    database: Database,
    new_publisher: NewPublisher,
    stream: OpenStream,
    channel: str,
    transactions: int,
) -> None:
    client = stream(channel).wait_open()
    database.send(channel, "first")
    fill(database, channel, transactions)
    with database.connect(autocommit=False) as held:
        held.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        held.execute("SELECT count(*) FROM pg_eventstream_channel")
        publisher = new_publisher().lead()
        started = time.monotonic()
        client.wait_count(1, timeout=60)
        first_after = time.monotonic() - started
        acknowledged = "SELECT coalesce(max(position), 0) FROM pg_eventstream_proxy"
        wait_until(lambda: database.value(acknowledged) >= 100_000, timeout=60, check=0.2)
        wait_until(lambda: position(database) == EVENTS + 1, timeout=600, check=0.5)
        all_after = time.monotonic() - started
        peak = _peak_memory_mb(publisher.pid)
    print(  # noqa: T201
        f"first event after {first_after:.1f} s, all sequenced after {all_after:.1f} s,"
        f" peak memory {peak:.0f} MB"
    )
    assert first_after < FIRST_WITHIN
    assert peak < MEMORY_MB


@pytest.mark.thorough
def test_publisher_that_is_stopped_in_a_backlog_keeps_what_it_has_sequenced(
    database: Database,
    new_publisher: NewPublisher,
    stream: OpenStream,
    channel: str,
) -> None:
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data)"
        " SELECT %s, n FROM generate_series(1, 150000) AS n",
        [channel],
    )
    last = "SELECT max(eid) FROM pg_eventstream_stream WHERE channel = %s"
    with database.connect(autocommit=False) as other:
        # Another session sequenced the first slice and is about to sequence the second.
        assert other.execute("SELECT pg_eventstream_sequence()").fetchone() == (50_000,)
        other.commit()
        assert other.execute("SELECT pg_eventstream_sequence()").fetchone() == (100_000,)
        publisher = new_publisher().lead()
        wait_for_waiting(database, "leader")
        publisher.stop()
        other.rollback()
    assert database.value(last, [channel]) == 50_000
    new_publisher().lead()
    wait_until(lambda: database.value(last, [channel]) == 150_000, timeout=30)


@pytest.mark.faults
@pytest.mark.thorough
def test_ten_thousand_channels_are_published_in_bounded_memory(
    database: Database,
    publisher: PublisherProcess,
    stream: OpenStream,
    channel: str,
) -> None:
    few = [f"{channel}-{n}" for n in (0, 4_711, 9_999)]
    clients = [stream(name).wait_open() for name in few]
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data)"
        " SELECT %s || (n %% 10000), n / 10000 FROM generate_series(0, %s) AS n",
        [f"{channel}-", 10_000 * EACH - 1],
    )
    for name, client in zip(few, clients, strict=True):
        events = client.wait_count(EACH, timeout=60)
        assert [event.data for event in events] == [str(n) for n in range(EACH)]
        assert [event.eids for event in events] == [{name: n} for n in range(1, EACH + 1)]
    for name, client in zip(few, clients, strict=True):
        database.send(name, "live")
        assert client.wait_count(EACH + 1)[-1].data == "live"
    assert _peak_memory_mb(publisher.pid) < MEMORY_MB


def _peak_memory_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
