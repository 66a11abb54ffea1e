"""What happens after an event has failed: retries, parking, stopping, and what does not count."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from django.db import connection as django_connection

from pg_eventstream import send_event, send_events
from pg_eventstream.limits import LIMITS
from pg_eventstream.servers.processes import wait_until
from tests.support.consumers import ConsumerProcess, Handled, declared
from tests.support.database import Database
from tests.support.environment import THOROUGH

pytestmark = [pytest.mark.faults]


def stock(**options: Any) -> dict[str, str]:
    declaration = {
        "name": "stock",
        "handler": "obey",
        "start": "earliest",
        "retry": {"attempts": 3, "backoff": 0.01},
    }
    return declared({**declaration, **options})


def parked(database: Database) -> list[tuple[Any, ...]]:
    return database.fetch(
        "SELECT channel, number, attempts, error FROM pg_eventstream_parked ORDER BY position"
    )


def test_event_is_tried_again_after_a_growing_delay_and_other_slots_go_on(
    database: Database,
) -> None:
    handled = Handled(database)
    send_event("slow", "message", {"fail": "not yet", "until_attempt": 3})
    send_event("slow", "message", "after it")
    send_event("other", "message", "meanwhile")  # of another slot
    with ConsumerProcess(environment=stock(retry={"attempts": 3, "backoff": 1})):
        handled.wait("stock", 3)
    assert handled.eids("stock") == {"other": [1], "slow": [1, 2]}
    assert database.fetch("SELECT channel, eid, attempt FROM handled ORDER BY nth") == [
        ("other", 1, 1),
        ("slow", 1, 3),
        ("slow", 2, 1),
    ]
    assert parked(database) == []
    assert database.fetch("SELECT FROM pg_eventstream_slot WHERE failing IS NOT NULL") == []


def test_later_events_of_a_parked_channel_are_parked_after_it(database: Database) -> None:
    handled = Handled(database)
    send_event("c", "message", {"fail": "never"})
    send_events([("c", "message", n) for n in range(3)])
    send_events([(f"d{n}", "message", n) for n in range(20)])
    environment = stock(on_failure="park-channel")
    after = "An earlier event of the channel 'c' is parked."
    with ConsumerProcess(environment=environment):
        handled.wait("stock", 20)
        wait_until(lambda: len(parked(database)) == 4, timeout=20)
    with ConsumerProcess(environment=environment):  # it is not forgotten
        send_event("c", "message", 4)
        wait_until(lambda: len(parked(database)) == 5, timeout=20)
        assert parked(database) == [
            ("c", 1, 3, "ValueError: never"),
            *(("c", n, 0, after) for n in range(2, 6)),
        ]
        assert "c" not in handled.eids("stock")
        # The cause is removed, and all are asked for.
        database.execute(
            "UPDATE pg_eventstream_parked SET retry = true, data = '0' WHERE number = 1;"
            "UPDATE pg_eventstream_parked SET retry = true; NOTIFY pg_eventstream_consumers"
        )
        handled.wait("stock", 25)
        send_event("c", "message", 5)
        handled.wait("stock", 26)
    assert handled.eids("stock")["c"] == [1, 2, 3, 4, 5, 6]
    assert parked(database) == []


def test_consumer_that_is_to_stop_waits_for_a_person(database: Database) -> None:
    handled = Handled(database)
    send_events([("c", "message", 1), ("c", "message", {"fail": "wrong"}), ("c", "message", 3)])
    environment = stock(on_failure="stop")
    is_stopped = "SELECT count(*) FROM pg_eventstream_slot WHERE stopped AND attempts = 3"
    with ConsumerProcess(environment=environment):
        wait_until(lambda: database.value(is_stopped) == 1, timeout=20)
    with ConsumerProcess(environment=environment):  # also after a restart
        send_event("other", "message", 1)
        handled.wait("stock", 2)
    assert handled.eids("stock") == {"c": [1], "other": [1]}
    assert database.value(is_stopped) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("code", ["40001", pytest.param("40P01", marks=pytest.mark.thorough)])
def test_deadlocks_and_serialization_failures_do_not_count_up_to_a_bound(
    database: Database, code: str
) -> None:
    handled = Handled(database)
    conflict = f"DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '{code}'; END $$"
    send_event("c", "message", {"sql": conflict})
    send_event("c", "message", "after it")
    with ConsumerProcess(environment=stock(retry={"attempts": 2, "backoff": 0})) as process:
        handled.wait("stock", 1, timeout=60)
        wait_until(lambda: len(parked(database)) == 1, timeout=30)
    assert [row[:3] for row in parked(database)] == [("c", 1, 2)]
    assert process.log.count("attempt 1 of 2 failed: OperationalError: conflict") == 1
    assert int(database.value(_ROLLED_BACK)) >= 2 * LIMITS.transient


_ROLLED_BACK = """
    SELECT xact_rollback FROM pg_stat_database WHERE datname = current_database()
"""


def test_real_deadlock_is_resolved_without_an_attempt(database: Database) -> None:
    handled = Handled(database)
    database.execute("CREATE TABLE stock AS SELECT n FROM generate_series(1, 2) AS n")
    lock = "UPDATE stock SET n = n WHERE n = {}"
    send_event("c", "message", {"sql": f"{lock.format(1)}; SELECT pg_sleep(0.5); {lock.format(2)}"})
    with database.connect(autocommit=False) as other, ConsumerProcess(environment=stock()) as ran:
        other.execute(lock.format(2))
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: database.value(waits) > 0, timeout=20)
        thread = threading.Thread(target=lambda: other.execute(lock.format(1)))
        try:
            thread.start()
            thread.join(10)
        finally:
            other.rollback()
        handled.wait("stock", 1)
    assert database.fetch("SELECT attempt FROM handled") == [(1,)]
    assert "attempt" not in ran.log


def test_database_that_is_away_is_no_fault_of_the_event(database: Database) -> None:
    handled = Handled(database)
    send_event("c", "message", {"sleep": 1, "recorded": True})
    with ConsumerProcess(environment=stock()) as process:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"
        wait_until(lambda: database.value(waiting) == 1, timeout=20)
        database.postgres.stop("immediate")
        process.wait_for_log("consumer stock: database: ")
        database.postgres.start()
        handled.wait("stock", 1, timeout=40)
    assert database.fetch("SELECT eid, attempt FROM handled") == [(1, 1)]


@pytest.mark.parametrize("commit", ["off", pytest.param("on", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("batch", [1, pytest.param(20, marks=pytest.mark.thorough)])
def test_crash_of_postgresql_undoes_what_was_handled_only_with_its_checkpoint(
    database: Database, commit: str, batch: int
) -> None:
    """So it is handled again. With synchronous_commit = off it had been committed before."""
    handled = Handled(database)
    environment = stock(batch=batch) | {"PGOPTIONS": f"-c synchronous_commit={commit}"}
    crashes, events, channels = (10 if THOROUGH else 2), 200, 5
    with ConsumerProcess(environment=environment) as process:
        for _ in range(crashes):
            send_events([(f"c{n % channels}", "message", n) for n in range(events)])
            handled.wait("stock", handled.count("stock") + 20)
            database.postgres.kill()
            database.postgres.start()
            django_connection.close()
        handled.wait("stock", crashes * events, timeout=60)
        assert "attempt" not in process.log
    assert handled.eids("stock") == {
        f"c{n}": [*range(1, crashes * events // channels + 1)] for n in range(channels)
    }
