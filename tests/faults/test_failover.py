"""A standby is promoted after the primary has died; no committed event is lost or duplicated."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.application import application
from tests.support.chance import seeded
from tests.support.copied import copied
from tests.support.database import Database
from tests.support.environment import DIRECTORY, THOROUGH
from tests.support.load import Load
from tests.support.network import Network
from tests.support.publisher import NewPublisher
from tests.support.sse_client import SSEClient

pytestmark = pytest.mark.faults


FAILOVERS = 6 if THOROUGH else 1


@pytest.fixture
def pair(database: Database) -> Iterator[tuple[Postgres, Postgres]]:
    """A primary with the test's database, and its synchronous standby."""
    started: list[Postgres] = []
    try:
        primary = copied(database.postgres, DIRECTORY / f"{database.name}-a")
        started.append(primary)
        standby = copied(primary, DIRECTORY / f"{database.name}-b", "--write-recovery-conf")
        started.append(standby)
        with psycopg.connect(primary.dsn(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
        state = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        on_primary = Database(primary, "postgres")
        wait_until(lambda: on_primary.value(state) == 1, timeout=20)
        yield primary, standby
    finally:
        for server in started:
            server.stop("immediate")


def promote(standby: Postgres) -> None:
    with psycopg.connect(standby.dsn(), autocommit=True) as connection:
        assert connection.execute("SELECT pg_promote()").fetchone() == (True,)


@pytest.mark.parametrize("attempt", range(FAILOVERS))
def test_nothing_is_lost_or_repeated_when_the_standby_is_promoted(
    database: Database,
    pair: tuple[Postgres, Postgres],
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    app_port: int,
    channel: str,
    attempt: int,
) -> None:
    """The publisher looks for the primary; the others' connections are redirected.

    Another publisher knows only the standby, which becomes useful when it is promoted.
    """
    chance = seeded()
    primary, standby = pair
    with Network(primary.port) as network:
        served = Database(primary, database.name)
        served.dsn = f"postgresql://postgres@127.0.0.1:{network.port}/{database.name}"
        app = application(app_port, pushpin, PG_EVENTSTREAM_TEST_DSN=served.dsn)
        try:
            with SSEClient(f"{pushpin.url}/events/", [channel]) as client:
                client.wait_open()
                publisher = new_publisher(
                    f"--dsn=host=127.0.0.1,127.0.0.1 port={primary.port},{standby.port}"
                    f" dbname={database.name} user=postgres target_session_attrs=read-write"
                ).lead()
                astray = new_publisher(f"--dsn={standby.dsn(database.name)}")
                astray.start()
                astray.wait_for_log("this is a standby; to find the primary among several hosts")
                load = Load(served, channel, persistent=True, seed=chance.randrange(1000))
                with load.running():
                    client.wait_count(chance.randrange(50, 150))
                    primary.kill()
                    promote(standby)
                    network.point(standby.port)
                    client.wait_count(len(client.events) + 100)
                load.settle()
                load.check(client)
                assert client.connections == 1
                assert publisher.running
                wait_until(
                    lambda: "standing by" in astray.log or "leading" in astray.log, timeout=20
                )
        finally:
            app.stop()


def test_ids_that_were_lost_with_the_primary_are_told_from_those_given_since(
    database: Database,
    pair: tuple[Postgres, Postgres],
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    app_port: int,
    channel: str,
) -> None:
    """The standby is asynchronous and has not received the last two of five events."""
    primary, standby = pair
    on_primary, on_standby = Database(primary, database.name), Database(standby, database.name)
    with Network(primary.port) as network:
        served = Database(primary, database.name)
        served.dsn = f"postgresql://postgres@127.0.0.1:{network.port}/{database.name}"
        app = application(app_port, pushpin, PG_EVENTSTREAM_TEST_DSN=served.dsn)
        try:
            url = f"{pushpin.url}/events/"
            with (
                SSEClient(url, [channel], reconnect=True) as stayer,
                SSEClient(url, [channel], reconnect=True) as other,
            ):
                stayer.wait_open()
                other.wait_open()
                publisher = new_publisher(f"--dsn={served.dsn}").lead()
                for n in range(1, 4):
                    on_primary.send(channel, f"kept {n}")
                stayer.wait_count(3)
                other.wait_count(3)
                other.close()
                replayed = "SELECT count(*) FROM pg_eventstream_stream"
                wait_until(lambda: on_standby.value(replayed) == 3, timeout=20)
                for server, name in (
                    (on_primary, "synchronous_standby_names"),
                    (on_standby, "primary_conninfo"),
                ):
                    server.execute(f"ALTER SYSTEM SET {name} = ''")
                    server.execute("SELECT pg_reload_conf()")
                receivers = "SELECT count(*) FROM pg_stat_replication"
                wait_until(lambda: on_primary.value(receivers) == 0, timeout=20)
                for n in range(4, 6):
                    on_primary.send(channel, f"lost {n}")
                stayer.wait_count(5)
                primary.kill()
                promote(standby)
                network.point(standby.port)

                new = [f"new {n}" for n in range(4, 8)]
                for data in new:
                    on_standby.send(channel, data)
                stayer.wait_for(lambda: any(e.type == "stream-reset" for e in stayer.control))
                on_standby.send(channel, "last")
                stayer.wait_for(lambda: stayer.events[-1].data == "last")
                publisher.wait_for_log("the stream is not the same as before")
                # A lost id is distinguished from that of the event in its place.
                with SSEClient(url, [channel], last_event_id=stayer.events[4].id) as back:
                    back.wait_for(lambda: any(e.type == "stream-reset" for e in back.control))
                    assert not back.events
                # A client whose id is not lost continues where it was.
                with SSEClient(url, [channel], last_event_id=other.events[-1].id) as back:
                    assert [event.data for event in back.wait_count(5)] == [*new, "last"]
                    assert not [e for e in back.control if e.type == "stream-reset"]
        finally:
            app.stop()
