"""No event waits: not while the publisher sleeps, is awake, or is about to sleep.

The safety poll is off in all of these tests, so that only the doorbell can wake the publisher.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import psycopg
import pytest

from pg_eventstream.postgres import listener as listener_module
from pg_eventstream.postgres.listener import DEAF_POLL
from pg_eventstream.postgres.sequence import sequence
from pg_eventstream.publisher.doorbell import Doorbell, State
from tests.support.database import Database


def test_publisher_does_not_sleep_before_the_newest_transaction_that_found_it_awake_is_over(
    database: Database,
) -> None:
    """Wait until no earlier transaction is open, so that snapshots contain all earlier ones."""
    with (
        database.connect() as listener,
        database.connect() as locker,
        closing(Doorbell(listener, locker, safety_poll=None)) as doorbell,
        database.connect(autocommit=False) as sender,
    ):
        sender.execute("SET CONSTRAINTS ALL IMMEDIATE")
        sender.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('c', '')")
        while doorbell.state is State.AWAKE:
            doorbell.wait(0)
        for _ in range(5):
            doorbell.wait(0)
            assert doorbell.state is State.DROWSY
        sender.commit()
        while doorbell.state is State.DROWSY:
            doorbell.wait(0)
        # One more round, then it sleeps.
        assert sequence(listener) == 1


class Pooled(psycopg.Connection[Any]):
    """A connection like one through a pooler in transaction mode: LISTEN has no effect."""

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> psycopg.Cursor[Any]:
        return super().execute("SELECT" if "LISTEN" in str(query) else query, *args, **kwargs)


def test_where_listen_does_not_work_the_publisher_says_so_and_polls(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float | None] = []
    wait_readable = listener_module._wait_readable

    def recorded(timeout: float | None, *files: int) -> None:
        waits.append(timeout)
        wait_readable(timeout, *files)

    with (
        Pooled.connect(database.dsn, autocommit=True) as listener,
        database.connect() as locker,
        closing(Doorbell(listener, locker, safety_poll=None)) as doorbell,
    ):
        assert f"polls every {DEAF_POLL * 1000:.0f} ms" in caplog.text
        assert "Use a direct connection" in caplog.text
        deadline = time.monotonic() + 10
        while doorbell.state is not State.ASLEEP:
            doorbell.wait(0)
            assert time.monotonic() < deadline
        monkeypatch.setattr(listener_module, "_wait_readable", recorded)
        database.send("c")
        doorbell.wait(0)
        # One poll, and not the sleep without an end.
        assert waits == [DEAF_POLL]
        assert sequence(listener) == 1


def test_wake_at_the_very_end_of_a_part_of_a_sleep_ends_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a publisher that is stopped at this moment would sleep on."""

    def wait_and_wake(timeout: float | None, *files: int) -> None:
        assert timeout is not None
        time.sleep(timeout)
        doorbell.wake()

    def beat() -> None:
        pytest.fail("it sleeps on")

    with (
        database.connect() as connection,
        database.connect() as locker,
        closing(Doorbell(connection, locker, safety_poll=None, beat=beat, every=0.01)) as doorbell,
    ):
        monkeypatch.setattr(listener_module, "_wait_readable", wait_and_wake)
        doorbell._sleep(time.monotonic())
