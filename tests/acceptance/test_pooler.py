"""PgBouncer in transaction mode: senders work unchanged, a publisher is told what is wrong."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psycopg
import pytest

from pg_eventstream.limits import Limits
from pg_eventstream.postgres.connector import Connector, explain
from pg_eventstream.servers.processes import wait_until
from tests.support import forked
from tests.support.database import Database
from tests.support.environment import child_environment
from tests.support.load import Load
from tests.support.pgbouncer import pgbouncer
from tests.support.publisher import NewPublisher
from tests.support.sse_client import OpenStream

pytestmark = pytest.mark.faults


@pytest.fixture
def pooled(database: Database) -> Iterator[str]:
    """The database through PgBouncer, which shares its sessions among all clients."""
    with pgbouncer(database) as dsn:
        yield dsn


PYTHON_SENDER = """
import sys
import django
django.setup()
from django.db import transaction
from pg_eventstream import send_event
for n in range(20):
    with transaction.atomic():
        send_event(sys.argv[1], "message", n)
"""


def test_events_of_senders_behind_a_pooler_are_delivered_promptly(
    pooled: str, database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    # Only the doorbell can deliver an event.
    new_publisher(PG_EVENTSTREAM_TEST_SAFETY_POLL="off").lead()
    sender = [sys.executable, "-c", PYTHON_SENDER, channel]
    sent = forked.run(sender, child_environment(PG_EVENTSTREAM_TEST_DSN=pooled))
    assert sent.returncode == 0, sent.stderr
    client.wait_count(20)
    with psycopg.connect(pooled) as connection:
        for n in range(20, 30):
            connection.execute(
                "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s)",
                [channel, str(n)],
                prepare=False,
            )
            connection.commit()
            client.wait_count(n + 1)
    assert [event.data for event in client.events] == [str(n) for n in range(30)]


WITHOUT_LISTEN = "so that two publishers can lead at once. Use a direct connection"


@pytest.mark.thorough
def test_publisher_behind_a_pooler_says_what_is_wrong_and_delivers_by_polling(
    pooled: str, database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    # Only the poll can deliver an event.
    publisher = new_publisher(f"--dsn={pooled}", PG_EVENTSTREAM_TEST_SAFETY_POLL="off").lead()
    publisher.wait_for_log(WITHOUT_LISTEN)
    load = Load(database, channel)
    with load.running():
        client.wait_count(100)
        # It leaves no traces in sessions, which belong to the application as well.
        with ExitStack() as stack:
            for _ in range(10):  # all sessions, and some more
                session = stack.enter_context(psycopg.connect(pooled))
                assert not session.execute(
                    "SELECT name FROM pg_settings WHERE source = 'session' AND name = ANY(%s)",
                    [["synchronous_commit", "enable_hashjoin", "statement_timeout"]],
                ).fetchall()
        bell = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'"
        assert not database.fetch(f"{bell} AND objid = 1")
    load.check(client)
    # Nor anything that would prevent another publisher from leading.
    publisher.kill()
    new_publisher().lead()


def test_pooler_is_recognised_while_others_look_for_one(pooled: str, database: Database) -> None:
    """A publisher's connections do so at the same time, each in sessions of the others."""
    connector = Connector("default", pooled, Limits(probe=0.1))
    over = threading.Event()

    def look() -> None:
        with database.connect() as other:
            while not over.is_set():
                other.execute("NOTIFY pg_eventstream_probe")

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            for _ in range(20):
                with connector.connect("test") as found:
                    assert found.shared
        finally:
            over.set()
        looking.result()


def test_session_that_may_only_read_is_not_taken_for_a_standby(
    pooled: str, database: Database
) -> None:
    """A direct connection turns this off for itself; the sessions of a pooler keep it."""
    database.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    with Connector("default", pooled).connect("test") as session:
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction) as raised:
            session.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', '')")
        assert "default_transaction_read_only is on" in explain(raised.value)
        assert "standby" not in explain(raised.value)


@pytest.mark.thorough
def test_two_publishers_behind_a_pooler_both_lead_repeat_nothing_and_give_way_to_a_direct_one(
    pooled: str, database: Database, new_publisher: NewPublisher, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    load = Load(database, channel, pause=0.02)
    with load.running():
        publishers = [new_publisher(f"--dsn={pooled}").lead() for _ in range(2)]
        client.wait_count(len(client.events) + 100)
        direct = new_publisher().lead()
        client.wait_count(len(client.events) + 100)
        for publisher in publishers:
            wait_until(lambda p=publisher: "standing by" in p.log, timeout=30)  # type: ignore[misc]
        client.wait_count(len(client.events) + 100)
        direct.kill()
        wait_until(lambda: any(p.log.count(": leading") > 1 for p in publishers), timeout=20)
    load.check(client)
