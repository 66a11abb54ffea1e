"""Clients and publisher switch to a copy in another cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.application import application
from tests.support.database import Database
from tests.support.dumped_database import dump, restore
from tests.support.environment import DIRECTORY
from tests.support.publisher import NewPublisher
from tests.support.sse_client import SSEClient


@pytest.fixture(scope="module")
def other_cluster() -> Iterator[Postgres]:
    with Postgres(DIRECTORY / "other-postgres") as server:
        yield server


def test_clients_and_publisher_continue_in_the_new_cluster(
    database: Database,
    other_cluster: Postgres,
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    app_port: int,
    channel: str,
    tmp_path: Path,
) -> None:
    app = application(app_port, pushpin, PG_EVENTSTREAM_TEST_DSN=database.dsn)
    try:
        events_url = f"{pushpin.url}/events/"
        with (
            SSEClient(events_url, [channel]) as leaver,
            SSEClient(events_url, [channel], reconnect=True) as stayer,
        ):
            leaver.wait_open()
            stayer.wait_open()
            publisher = new_publisher().lead()
            for n in range(1, 6):
                database.send(channel, f"published {n}")
            leaver.wait_count(5)
            stayer.wait_count(5)
            leaver.close()
            publisher.stop()

            for n in range(6, 8):
                database.send(channel, f"sequenced {n}")
            assert database.value("SELECT pg_eventstream_sequence()") == 2
            with database.connect(autocommit=False) as unfinished:
                unfinished.execute(
                    "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, 'unfinished')",
                    [channel],
                )
                for n in range(8, 11):
                    database.send(channel, f"committed {n}")
                dump(database, tmp_path / "dump")
                unfinished.rollback()
            app.stop()

            new = restore(tmp_path / "dump", other_cluster, database.name)
            app = application(app_port, pushpin, PG_EVENTSTREAM_TEST_DSN=new.dsn)
            moved = new_publisher(PG_EVENTSTREAM_TEST_DSN=new.dsn).lead()
            for n in range(11, 14):
                new.send(channel, f"new {n}")

            expected = [
                *(f"published {n}" for n in range(1, 6)),
                *(f"sequenced {n}" for n in range(6, 8)),
                *(f"committed {n}" for n in range(8, 11)),
                *(f"new {n}" for n in range(11, 14)),
            ]
            with SSEClient(events_url, [channel], last_event_id=leaver.events[2].id) as back:
                assert [event.data for event in back.wait_count(10)] == expected[3:]
                stayer.wait_count(13)
                new.send(channel, "last")
                # A duplicate or an additional event would have arrived before this one.
                for client, first in ((back, 4), (stayer, 1)):
                    client.wait_for(lambda c=client: c.events[-1].data == "last")  # type: ignore[misc]
                    assert [event.data for event in client.events] == [
                        *expected[first - 1 :], "last",
                    ]  # fmt: skip
                    assert [event.eids[channel] for event in client.events] == list(
                        range(first, 15)
                    )
                    assert not [e for e in client.control if e.type != "stream-open"]
            moved.stop()
    finally:
        app.stop()
