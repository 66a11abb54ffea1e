"""A database is emptied, set back or replaced while processes use it.

No process waits for positions of a stream that is gone, no id is used twice, and clients that
hold a lost id are told so.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from django.core.management import call_command
from django.db import connections

from pg_eventstream import get_events
from pg_eventstream.servers.processes import Process
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.publisher import NewPublisher
from tests.support.sse_client import Received, SSEClient

Way = Callable[[Database, Path], None]

ALL = ["event", "outbox", "stream", "channel", "cursor", "publisher", "proxy"]
TABLES = [f"pg_eventstream_{name}" for name in ALL]


def flush(database: Database, dump: Path) -> None:
    """Empty the tables, as Django's tests and developers do."""
    call_command("flush", interactive=False, verbosity=0)
    connections.close_all()


def truncate(*tables: str) -> Way:
    def way(database: Database, dump: Path) -> None:
        database.execute(f"TRUNCATE {', '.join(f'pg_eventstream_{table}' for table in tables)}")

    return way


def delete(*tables: str) -> Way:
    def way(database: Database, dump: Path) -> None:
        for table in tables:
            database.execute(f"DELETE FROM pg_eventstream_{table}")

    return way


def restore_older(database: Database, dump: Path) -> None:
    """Replace the content by the dump that was taken after 3 of 5 events."""
    database.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    pg_restore(database, dump)


def restore_older_rows(database: Database, dump: Path) -> None:
    database.execute(f"TRUNCATE {', '.join(TABLES)}")
    tables = [f"--table={table}" for table in TABLES]
    pg_restore(database, dump, "--data-only", "--disable-triggers", *tables)
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 3


def replace_by_older(database: Database, dump: Path) -> None:
    create_anew(database)
    pg_restore(database, dump)


def replace_by_new(database: Database, dump: Path) -> None:
    create_anew(database, "TEMPLATE template_migrated")


def create_anew(database: Database, template: str = "TEMPLATE template0") -> None:
    with psycopg.connect(database.postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {database.name} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {database.name} {template}")


def pg_restore(database: Database, dump: Path, *arguments: str) -> None:
    subprocess.run(
        [str(database.postgres.program("pg_restore")), "--exit-on-error", *arguments,
         f"--dbname={database.dsn}", str(dump)],
        check=True, timeout=60,
    )  # fmt: skip


WAYS = {
    "flushed": flush,
    "all truncated": truncate(
        "event", "outbox", "stream", "channel", "cursor", "publisher", "proxy"
    ),
    "all truncated but what is remembered of it": truncate("event", "outbox", "stream"),
    "stream truncated": truncate("stream", "outbox"),
    "events truncated": truncate("event"),
    "all deleted": delete(*ALL),
    "all deleted but the cursor": delete("event", "outbox", "stream", "channel"),
    "events deleted": delete("event"),
    "an older dump restored": restore_older,
    "older rows restored": restore_older_rows,
    "replaced by an older dump": replace_by_older,
    "replaced by a new one": replace_by_new,
}


#: A client that has all events up to this one loses none.
LOSSLESS = (WAYS["events deleted"], WAYS["events truncated"])


def send(database: Database, channel: str, first: int, last: int) -> list[str]:
    sent = [f"event {n}" for n in range(first, last + 1)]
    for data in sent:
        database.send(channel, data)
    return sent


#: Each has a relative that is run more often.
SELDOM = (
    "all truncated",
    "stream truncated",
    "events truncated",
    "all deleted",
    "older rows restored",
)


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            way,
            id=name,
            marks=(pytest.mark.faults, pytest.mark.thorough) if name in SELDOM else (),
        )
        for name, way in WAYS.items()
    ],
)
def test_streams_are_told_what_is_lost_and_continue(
    way: Way,
    database: Database,
    app: Process,
    app_port: int,
    pushpin: Pushpin,
    new_publisher: NewPublisher,
    channel: str,
    tmp_path: Path,
) -> None:
    """Through the proxy, which remembers ids for a minute, and without it."""
    publisher = new_publisher().lead()
    urls = [f"{pushpin.url}/events/", f"http://127.0.0.1:{app_port}/events/"]
    with (
        SSEClient(urls[0], [channel], reconnect=True) as proxied,
        SSEClient(urls[1], [channel], reconnect=True) as direct,
        SSEClient(urls[1], [channel]) as leaver,
    ):
        for client in (proxied, direct, leaver):
            client.wait_open()
        send(database, channel, 1, 3)
        for client in (proxied, direct, leaver):
            client.wait_count(3)
        subprocess.run(
            [str(database.postgres.program("pg_dump")), "--format=custom",
             f"--file={tmp_path / 'dump'}", database.dsn],
            check=True, timeout=60,
        )  # fmt: skip
        send(database, channel, 4, 5)
        for client in (proxied, direct, leaver):
            client.wait_count(5)
        leaver.close()

        way(database, tmp_path / "dump")
        sent = send(database, channel, 6, 12)
        for client in (proxied, direct):
            client.wait_for(
                lambda c=client: bool(resets(c)) or c.events[-1].data == sent[-1]  # type: ignore[misc]
            )
        sent += send(database, channel, 13, 13)
        for client in (proxied, direct):
            client.wait_for(lambda c=client: c.events[-1].data == sent[-1])  # type: ignore[misc]
            if way in LOSSLESS:
                assert [event.data for event in client.events[5:]] == sent
                assert not resets(client)
            else:
                check_told(client, sent)
        if way is not WAYS["events deleted"]:
            publisher.wait_for_log("the stream is not the same as before")

        # A client that was away misses events that are gone, or has ids that are lost.
        for url in urls:
            with SSEClient(url, [channel], last_event_id=leaver.events[2].id) as back:
                back.wait_open()
                back.wait_for(lambda c=back: bool(resets(c) or len(c.events) == 8))  # type: ignore[misc]
                if way in (restore_older, restore_older_rows, replace_by_older):
                    assert [event.data for event in back.events] == sent  # its id is valid
                else:
                    assert resets(back)
        # A client that knows the current state resumes exactly.
        begin = (resets(proxied) or proxied.events[-2:-1])[-1]
        page = get_events([channel], begin.id)
        later = proxied.events[5:] if resets(proxied) else proxied.events[-1:]
        assert [event.data for event in page.events] == [event.data for event in later]
        assert not page.reset


def resets(client: SSEClient) -> list[Received]:
    return [event for event in client.control if event.type == "stream-reset"]


def check_told(client: SSEClient, sent: list[str]) -> None:
    """The client was told once that events are lost, and got everything sent after that."""
    (reset,) = resets(client)
    (channel,) = json.loads(reset.data)["channels"]
    begin = reset.eids[channel]
    later = client.events[5:]
    assert [event.eids[channel] for event in later] == [begin + n + 1 for n in range(len(later))]
    assert [event.data for event in later] == sent[len(sent) - len(later) :]
    ids = [event.id.strip() for event in client.events]
    assert len(set(ids)) == len(ids)
