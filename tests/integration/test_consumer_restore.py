"""Tables are emptied or restored, all or some, and consumers continue rightly or say what is wrong.

Each case is tried with a process that begins after that, and with one that runs meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from django.db import connection as django_connection

from pg_eventstream import send_events
from pg_eventstream.consumers import checkpoints, consumer, declare
from pg_eventstream.consumers.runner import Runner
from pg_eventstream.consumers.waiting import wait
from pg_eventstream.errors import CheckpointAhead, ConsumerStopped, EventStreamError
from pg_eventstream.limits import LIMITS
from pg_eventstream.postgres.slots import SLOTS
from tests.support.consumers import Handled
from tests.support.database import Database
from tests.support.dumped_data import as_default
from tests.support.dumped_database import dump, restore
from tests.support.handlers import named, record

STREAM = ["event", "outbox", "stream", "channel", "cursor"]
CONSUMERS = ["consumer", "checkpoint", "slot", "parked"]
#: What a slot's error says.
AHEAD = "emptied, restored or replaced"
#: The events that are handled before, and after a dump that can be restored.
BEFORE, AFTER = 10, 5

Way = Callable[[Database], None]


def declared(start: declare.Start = "earliest") -> declare.Consumer:
    return consumer("stock", start=start)(named(record, "stock"))


def send(database: Database, count: int) -> None:
    send_events([("a", "message", n) for n in range(count)])
    database.execute("SELECT pg_eventstream_sequence()")


def save(database: Database) -> None:
    """As pg_dump does."""
    database.execute("CREATE SCHEMA saved")
    for table in [*STREAM, *CONSUMERS]:
        database.execute(f"CREATE TABLE saved.{table} AS TABLE pg_eventstream_{table}")
    database.execute("CREATE TABLE saved.handled AS TABLE handled")


def truncate(*tables: str) -> Way:
    def way(database: Database) -> None:
        database.execute(f"TRUNCATE {', '.join(f'pg_eventstream_{table}' for table in tables)}")

    return way


def restored(*tables: str) -> Way:
    """As ``pg_restore --data-only --disable-triggers`` does with these tables."""

    def way(database: Database) -> None:
        truncate(*tables)(database)
        with database.connect() as connection:
            connection.execute("SET session_replication_role = replica")
            for table in tables:
                connection.execute(
                    f"INSERT INTO pg_eventstream_{table} OVERRIDING SYSTEM VALUE"
                    f" SELECT * FROM saved.{table}"
                )

    return way


def with_handled(way: Way) -> Way:
    """What the handlers have written is restored as well."""

    def both(database: Database) -> None:
        way(database)
        database.execute(
            "TRUNCATE handled; INSERT INTO handled OVERRIDING SYSTEM VALUE"
            " SELECT * FROM saved.handled"
        )

    return both


def emptied_and_filled_again(database: Database) -> None:
    truncate(*STREAM)(database)
    send(database, 3 * BEFORE)


def restored_and_continued(database: Database) -> None:
    restored(*STREAM)(database)
    send(database, 3 * BEFORE)


def restarted(database: Database) -> None:
    database.execute("TRUNCATE pg_eventstream_consumer RESTART IDENTITY")


FIRST = [*range(1, BEFORE + 1)]
ALL = [*range(1, BEFORE + AFTER + 1)]
NEXT = [BEFORE + AFTER + 1]
#: What happens, and what is handled in the end; or the error.
WAYS: dict[str, tuple[Way, list[int] | type[EventStreamError]]] = {
    "nothing": (lambda database: None, [*ALL, *NEXT]),
    "the stream is emptied": (truncate(*STREAM), CheckpointAhead),
    "the stream is emptied, and is longer than before": (emptied_and_filled_again, CheckpointAhead),
    "an older stream is restored": (restored(*STREAM), CheckpointAhead),
    "an older stream is restored, and is longer than before": (
        restored_and_continued,
        CheckpointAhead,
    ),
    "only places are emptied": (truncate("stream", "outbox", "cursor"), CheckpointAhead),
    # All of these were handled.
    "only events are emptied": (truncate("event"), [*ALL, *NEXT]),
    "older consumers are restored": (restored(*CONSUMERS), [*ALL, *range(BEFORE + 1, NEXT[0] + 1)]),
    "everything older is restored": (
        with_handled(restored(*STREAM, *CONSUMERS)),
        [*FIRST, BEFORE + 1],
    ),
    "everything is emptied": (truncate(*STREAM, *CONSUMERS), [*ALL, 1]),
    "all consumers are emptied": (truncate(*CONSUMERS), [*ALL, *ALL, *NEXT]),
    "the list of consumers is emptied": (truncate("consumer"), [*ALL, *ALL, *NEXT]),
    "the list of consumers is emptied, and their ids are given again": (
        restarted,
        [*ALL, *ALL, *NEXT],
    ),
    "checkpoints are emptied": (truncate("checkpoint"), ConsumerStopped),
    "slots are emptied": (truncate("slot"), ConsumerStopped),
}


def prepare(database: Database, own: declare.Consumer) -> None:
    send(database, BEFORE)
    assert own.drain() == BEFORE
    save(database)
    send(database, AFTER)
    assert own.drain() == AFTER


@pytest.mark.parametrize("way", WAYS)
def test_process_that_begins_later_continues_or_says_what_is_wrong(
    database: Database, handled: Handled, way: str
) -> None:
    happens, expected = WAYS[way]
    own = declared()
    prepare(database, own)
    happens(database)
    send(database, 1)
    if isinstance(expected, list):
        own.drain()
        assert handled.eids("stock") == {"a": expected}
        assert wait(own, 0)
        return
    for _ in range(2):
        with pytest.raises(expected):
            own.drain()
        assert not wait(own, 0)
    assert handled.eids("stock") == {"a": ALL}


#: A process that runs does not begin anew as a consumer that was removed.
GONE = {way for way, (happens, _) in WAYS.items() if "consumers is emptied" in way} | {
    "all consumers are emptied",
    "everything is emptied",
}


@pytest.mark.parametrize("way", WAYS)
def test_process_that_runs_meanwhile_continues_or_says_what_is_wrong(
    database: Database, handled: Handled, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    happens, expected = WAYS[way]
    if way == "slots are emptied":
        expected = [*ALL, *NEXT]  # it needs none of what is stored there
    own = declared()
    prepare(database, own)
    with database.connect() as connection:
        consumer_id = checkpoints.register(connection, own)
    runner = Runner(own, consumer_id, "default", "here:1/a", LIMITS)
    runner.grant(range(SLOTS))
    step(runner)
    happens(database)
    step(runner)
    send(database, 1)
    step(runner)
    runner.close()
    django_connection.close()
    if way in GONE or expected is ConsumerStopped:
        assert runner.gone
        assert "stopped here" in caplog.text
        expected = ALL
    elif expected is CheckpointAhead:
        assert AHEAD in caplog.text
        assert all(
            stopped and AHEAD in error
            for stopped, error in database.fetch("SELECT stopped, error FROM pg_eventstream_slot")
        )
        expected = ALL
    else:
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert handled.eids("stock") == {"a": expected}


def step(runner: Runner) -> None:
    for _ in range(20):
        if runner.step() and not runner.gone:
            break


def test_copy_of_a_database_continues_exactly_where_it_was(
    database: Database, handled: Handled, tmp_path: Path
) -> None:
    own = declared()
    send(database, BEFORE)
    assert own.drain() == BEFORE
    send_events([("a", "message", n) for n in range(3)])  # not in order yet
    dump(database, tmp_path / "dump")
    copy = restore(tmp_path / "dump", database.postgres, f"{database.name}_copy")
    with as_default(copy):
        assert own.drain() == 3
        send(copy, 1)
        assert own.drain() == 1
    eids = [eid for (eid,) in copy.fetch("SELECT eid FROM handled ORDER BY nth")]
    assert eids == [*range(1, BEFORE + 5)]
    assert own.drain() == 3  # and the original as well
