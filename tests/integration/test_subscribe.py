"""Subscribing to channels in Python."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import pytest
from django.db import connections

from pg_eventstream import EventsPruned, InvalidRequest, ReceivedEvent, send_event, subscribe
from pg_eventstream.postgres.threads import arun
from pg_eventstream.servers.processes import wait_until
from tests.support.database import Database
from tests.support.environment import child_environment
from tests.support.load import Load
from tests.support.rounds import prune, sequence

_T = TypeVar("_T")


def run(work: Callable[[], Awaitable[_T]], timeout: float = 60) -> _T:
    async def within() -> _T:
        return await asyncio.wait_for(work(), timeout)

    return asyncio.run(within())


async def take(
    count: int, *channels: str, after: str | None = None, act: Callable[[], Any] = lambda: None
) -> list[ReceivedEvent]:
    """Receive ``count`` events. ``act`` is called in a thread when the subscription has begun."""
    got: list[ReceivedEvent] = []
    acting = asyncio.get_running_loop().run_in_executor(None, act) if after else None
    async for event in subscribe(channels, after):
        got.append(event)
        if len(got) == count:
            break
    if acting is not None:
        await acting
    return got


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "hub" in thread.name]


def test_missed_events_then_live_ones_each_once_in_order(database: Database) -> None:
    for n in range(5):
        send_event("a", "old", n)
    sequence(database)

    def go_on() -> None:
        for n in range(5):
            send_event("ab"[n % 2], "new", {"n": n})
        connections.close_all()  # of this thread

    events = run(lambda: take(10, "a", "b", after="earliest", act=go_on))
    assert [event.type for event in events] == ["old"] * 5 + ["new"] * 5
    assert events[-1].json() == {"n": 4}
    assert [(event.channel, event.eid) for event in events[4:]] == [
        ("a", 5), ("a", 6), ("b", 1), ("a", 7), ("b", 2), ("a", 8),
    ]  # fmt: skip
    assert events[5].id == "a:6,b:0"
    assert [event.eid for event in run(lambda: take(3, "a", after="a:5"))] == [6, 7, 8]


def test_hub_ends_with_the_last_subscription(database: Database) -> None:
    send_event("a", "t", 1)
    for _ in range(3):
        assert len(run(lambda: take(1, "a", after="earliest"))) == 1
    wait_until(lambda: threads() == [], timeout=10)
    wait_until(
        lambda: database.value(
            "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'pg_eventstream hub'"
        ),
        timeout=10,
    )


def test_events_that_are_gone_are_no_silent_gap(database: Database) -> None:
    for n in range(3):
        send_event("a", "t", n)
    sequence(database)
    prune()
    send_event("a", "t", 3)
    with pytest.raises(EventsPruned) as raised:
        run(lambda: take(1, "a", "b", after="a:1,b:0"))
    assert (raised.value.channels, raised.value.last_event_id) in [
        (["a"], "a:3,b:0"),
        (["a"], "a:4,b:0"),
    ]
    with pytest.raises(InvalidRequest):
        run(lambda: take(1, "a", after="nonsense"))


def test_many_subscriptions_of_one_loop_and_of_several_get_everything(
    database: Database, channel: str
) -> None:
    load = Load(database, channel, senders=3)
    results: list[list[str]] = []

    async def follow(many: int) -> None:
        async def one() -> None:
            got: list[str] = []
            async for event in subscribe([channel], "earliest"):
                got.append(event.data)
                if event.data == "last":
                    break
            results.append(got)

        await asyncio.wait_for(asyncio.gather(*(one() for _ in range(many))), 60)

    loops = [threading.Thread(target=asyncio.run, args=[follow(5)]) for _ in range(2)]
    for loop in loops:
        loop.start()
    with load.running():
        wait_until(lambda: len(load.committed) >= 500, timeout=60)
    database.send(channel, "last")
    for loop in loops:
        loop.join()
    assert len(results) == 10
    for got in results:
        assert got == results[0]
        assert sorted(got) == sorted([*load.committed, "last"])


PROJECTION = """
import asyncio, sys
import django
django.setup()
from asgiref.sync import sync_to_async
from django.db import connection, transaction
from pg_eventstream import subscribe

def handle(event):
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("INSERT INTO seen (data) VALUES (%s)", [event.data])
        cursor.execute("UPDATE checkpoint SET id = %s", [event.id])

def last():
    with connection.cursor() as cursor:
        cursor.execute("SELECT id FROM checkpoint")
        return cursor.fetchone()[0]

async def main():
    async for event in subscribe([sys.argv[1]], await sync_to_async(last)()):
        await sync_to_async(handle)(event)

asyncio.run(main())
"""


@pytest.mark.faults
@pytest.mark.thorough
def test_projection_that_keeps_its_checkpoint_handles_each_event_once_however_often_it_is_killed(
    database: Database, channel: str
) -> None:
    database.execute(
        "CREATE TABLE seen (n serial, data text);"
        " CREATE TABLE checkpoint (id text); INSERT INTO checkpoint VALUES ('earliest')"
    )
    load = Load(database, channel, senders=2)
    seen = "SELECT count(*) FROM seen"
    with load.running():
        for _ in range(5):
            before = database.value(seen)
            with subprocess.Popen(
                [sys.executable, "-c", PROJECTION, channel], env=child_environment()
            ) as worker:
                more = f"SELECT count(*) > {before + 10} FROM seen"
                wait_until(partial(database.value, more), timeout=30)
                worker.kill()
    with subprocess.Popen(
        [sys.executable, "-c", PROJECTION, channel], env=child_environment()
    ) as worker:
        wait_until(lambda: database.value(seen) >= len(load.committed), timeout=30)
        worker.kill()
    rows = [row[0] for row in database.fetch("SELECT data FROM seen ORDER BY n")]
    stream = database.fetch(
        "SELECT data FROM pg_eventstream_stream AS s JOIN pg_eventstream_event AS e"
        " ON e.id = event_id ORDER BY position"
    )
    assert rows == [row[0] for row in stream]
    assert len(rows) == len(load.committed)


def test_readers_do_not_wait_for_each_other(database: Database) -> None:
    meeting = threading.Barrier(2, timeout=20)

    async def two_at_once() -> None:
        await asyncio.gather(arun(meeting.wait), arun(meeting.wait))

    async def one_then_two() -> None:
        for _ in range(20):
            await arun(lambda: None)  # starts a thread that has nothing to do
            await asyncio.sleep(0.01)
            await two_at_once()

    run(one_then_two)
