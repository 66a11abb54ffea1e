"""Tables are emptied or restored, all or some, and consumers continue rightly or say what is wrong.

Each case is tried with a process that begins after that, and with one that runs meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from django.db import connection as django_connection

from pg_eventstream import send_events
from pg_eventstream.consumers import Retry, checkpoints, consumer, declare
from pg_eventstream.consumers.declaration import Start
from pg_eventstream.consumers.operations import reset, skip
from pg_eventstream.consumers.runner import Runner
from pg_eventstream.consumers.waiting import wait
from pg_eventstream.errors import (
    CheckpointAhead,
    ConsumerStopped,
    EventStreamError,
    OperationRefused,
)
from pg_eventstream.limits import LIMITS
from pg_eventstream.postgres.slots import SLOTS
from tests.support.consumers import Handled, handle_all
from tests.support.database import Database
from tests.support.dumped_data import as_default
from tests.support.dumped_database import dump, restore
from tests.support.handlers import named, obey, record

STREAM = ["event", "outbox", "stream", "channel", "cursor"]
CONSUMERS = ["consumer", "checkpoint", "slot", "parked"]
#: What a slot's error says.
AHEAD = "emptied, restored or replaced"
#: The events that are handled before, and after a dump that can be restored.
BEFORE, AFTER = 10, 5

Way = Callable[[Database], None]


def declared(start: Start = "earliest") -> declare.Consumer:
    # An attempt that is counted wrongly would park an event.
    return consumer("stock", start=start, retry=Retry(1))(named(record, "stock"))


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


def prepare(database: Database, handle: Callable[[], int]) -> None:
    send(database, BEFORE)
    assert handle() == BEFORE
    save(database)
    send(database, AFTER)
    assert handle() == AFTER


@pytest.mark.parametrize("way", WAYS)
def test_process_that_begins_later_continues_or_says_what_is_wrong(
    database: Database, handled: Handled, way: str
) -> None:
    happens, expected = WAYS[way]
    own = declared()
    prepare(database, own.drain)
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
    runner = prepared_runner(database)
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
        # Slots without events are no further than before.
        [error] = database.value("SELECT array_agg(error) FROM pg_eventstream_slot WHERE stopped")
        assert AHEAD in error
        expected = ALL
    else:
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert handled.eids("stock") == {"a": expected}


@pytest.mark.parametrize(
    "way", [truncate(*STREAM), truncate("stream", "outbox", "cursor"), restored(*STREAM)]
)
def test_process_that_runs_meanwhile_reads_all_of_the_new_stream(
    database: Database, handled: Handled, way: Way
) -> None:
    """Also in slots whose checkpoint is not ahead, though the process has read further."""
    runner = prepared_runner(database)
    way(database)
    send_events([("b", "message", n) for n in range(3)])
    database.execute("SELECT pg_eventstream_sequence()")
    step(runner)
    runner.close()
    django_connection.close()
    assert handled.eids("stock") == {"a": ALL, "b": [1, 2, 3]}


def prepared_runner(database: Database) -> Runner:
    """A runner that has handled all events itself."""
    own = declared()
    with database.connect() as connection:
        consumer_id = checkpoints.register(connection, own)
    runner = Runner(own, consumer_id, "default", "here:1/a", LIMITS)
    runner.grant(range(SLOTS))
    prepare(database, lambda: handled_by(runner))
    return runner


def handled_by(runner: Runner) -> int:
    before = runner.handled
    step(runner)
    return runner.handled - before


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


def replayed(database: Database) -> list[bool]:
    """Of the events that were handled last, in their order."""
    rows = database.fetch("SELECT replayed FROM handled ORDER BY nth DESC LIMIT 20")
    return [is_replayed for (is_replayed,) in reversed(rows)]


@pytest.mark.parametrize("again", [True, False])
def test_new_events_of_a_restored_stream_are_no_replay(
    database: Database, handled: Handled, again: bool
) -> None:
    """The consumer was to handle more events again than there are now."""
    own = declared()
    prepare(database, own.drain)
    reset("default", "stock", "earliest")
    restored(*STREAM)(database)
    send(database, 20 - BEFORE)
    if again:
        reset("default", "stock", "earliest")
    assert own.drain() == 20
    assert replayed(database) == [True] * BEFORE + [False] * (20 - BEFORE)


def another_incarnation(database: Database) -> None:
    """As after a failover."""
    database.execute("UPDATE pg_eventstream_cursor SET cluster = 1")
    send(database, 0)


@pytest.mark.xfail(
    strict=True, reason="the cursor remembers where the last incarnation began, and no other"
)
def test_restored_stream_is_noticed_after_a_failover(database: Database, handled: Handled) -> None:
    own = declared()
    prepare(database, own.drain)
    restored_and_continued(database)
    another_incarnation(database)
    with pytest.raises(CheckpointAhead):
        own.drain()


def stopping() -> declare.Consumer:
    retry = Retry(1)
    return consumer("stock", start="earliest", on_failure="stop", retry=retry)(named(obey, "stock"))


def test_skipped_event_after_a_failover_is_no_place_ahead(
    database: Database, handled: Handled
) -> None:
    """Its slot has handled nothing since then."""
    own = stopping()
    send(database, BEFORE)
    assert own.drain() == BEFORE
    another_incarnation(database)
    send_events([("a", "message", {"fail": "x"}), ("a", "message", 2)])
    with pytest.raises(ConsumerStopped, match="has stopped"):
        handle_all(own)
    skip("default", "stock", f"{BEFORE + 1}")
    assert own.drain() == 1


@pytest.mark.parametrize(
    ("more", "message"), [(0, "has not handled a:.*resume stock"), (1, "events up to position 13")]
)
def test_nothing_of_a_restored_stream_is_skipped_with_an_event_of_the_lost_one(
    database: Database, handled: Handled, more: int, message: str
) -> None:
    own = stopping()
    send(database, BEFORE)
    assert own.drain() == BEFORE
    save(database)
    send_events([("b", "message", 1)] * 2 + [("a", "message", n) for n in range(more)])
    send_events([("a", "message", {"fail": "x"})])
    with pytest.raises(ConsumerStopped, match="has stopped"):
        handle_all(own)
    [(failing,)] = database.fetch("SELECT failing FROM pg_eventstream_slot WHERE stopped")
    restored(*STREAM)(database)
    send(database, BEFORE)
    with pytest.raises(OperationRefused, match=message):
        skip("default", "stock", str(failing))


def test_holder_that_a_backup_remembers_is_no_failed_attempt(
    database: Database, handled: Handled
) -> None:
    """With one attempt, an event that was never tried would be parked."""
    own = consumer("stock", start="earliest", retry=Retry(1))(named(record, "stock"))
    send(database, BEFORE)
    assert own.drain() == BEFORE
    database.execute("UPDATE pg_eventstream_slot SET holder = 'host:1/a'")  # as while it runs
    send(database, AFTER)
    save(database)
    with_handled(restored(*STREAM, *CONSUMERS))(database)
    assert handle_all(own) == AFTER
    assert database.fetch("SELECT FROM pg_eventstream_parked") == []
