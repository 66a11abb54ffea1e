"""A project moves from django-eventstream, and its clients notice nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.test import override_settings

from pg_eventstream import send_event
from pg_eventstream.servers.processes import wait_until
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.django_eventstream import DjangoEventstream
from tests.support.origin import Origin, behind_a_proxy
from tests.support.rounds import prune, publish_once, sequence

HOUR = timedelta(hours=1)


@pytest.fixture
def des(database: Database) -> DjangoEventstream:
    """django-eventstream in the same database."""
    return DjangoEventstream("default")


@pytest.fixture
def sqlite(database: Database, tmp_path: Path) -> Iterator[DjangoEventstream]:
    """django-eventstream in SQLite, under the alias "old"."""
    connections.settings["old"] = connections.configure_settings(
        {
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(tmp_path / "old.sqlite3"),
            }
        }
    )["default"]
    try:
        yield DjangoEventstream("old")
    finally:
        connections["old"].close()
        del connections["old"]
        del connections.settings["old"]


def run(*arguments: str) -> str:
    output = StringIO()
    call_command("eventstream_import", *arguments, stdout=output)
    return output.getvalue()


def resume(channel: str, eid: int) -> list[tuple[int, str]] | None:
    """What a client with this id of django-eventstream gets; None for a stream-reset."""
    with behind_a_proxy:
        answer = Origin().open(channel, last_event_id=f"{channel}:{eid}")
    if "stream-reset" in answer.control:
        assert not answer.events
        return None
    return [(event.eids[channel], event.data) for event in answer.events]


def everything(database: Database) -> list[list[tuple[Any, ...]]]:
    return [
        database.fetch(f"SELECT t.* FROM pg_eventstream_{table} AS t ORDER BY t::text")
        for table in ("event", "outbox", "stream", "channel", "cursor")
    ]


# Clients


@pytest.mark.parametrize("source", ["des", "sqlite"])
def test_client_resumes_exactly_with_the_id_that_it_holds(
    database: Database, request: pytest.FixtureRequest, source: str
) -> None:
    old: DjangoEventstream = request.getfixturevalue(source)
    old.send("room", *range(1, 6))
    old.send("other", "else")
    assert "2 channels imported, with 6 events to resume from." in run("--from", old.alias)
    send_event("room", "message", "new")
    sequence(database)
    expected = [*((n, str(n)) for n in range(1, 6)), (6, '"new"')]
    for eid in range(7):
        assert resume("room", eid) == expected[eid:]
    assert resume("other", 0) == [(1, '"else"')]


def test_pages_of_many_channels_keep_their_order(
    database: Database, des: DjangoEventstream
) -> None:
    des.execute(
        "INSERT INTO django_eventstream_event (channel, type, data, eid, created)"
        " SELECT 'c' || n %% 3, 'message', to_json(n::text), n / 3 + 1,"
        "        now() - interval '1 hour' + n * interval '1 ms'"
        "   FROM generate_series(0, 2999) n ORDER BY random()",
        [],
    )
    # Rows can be stored in another order than that of their keys.
    des.execute("UPDATE django_eventstream_event SET type = 'moved' WHERE id % 2 = 0")
    for n in range(3):
        des.count(f"c{n}", 1000)
    assert "3 channels imported, with 3000 events" in run()
    with behind_a_proxy:
        answer = Origin().open("c0", "c1", "c2", last_event_id="c0:0,c1:0,c2:0")
        data = answer.data
        while not answer.held:
            answer = Origin().follow(answer)
            data += answer.data
    assert data == [str(n) for n in range(3000)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, "é"]}, '{"a": [1, "\\u00e9"]}'),
        ("text", '"text"'),
        ('"quoted"', '"\\"quoted\\""'),
        ("", '""'),
        (7, "7"),
        (None, "null"),
    ],
)
def test_data_is_what_django_eventstream_would_have_sent(
    des: DjangoEventstream, value: Any, text: str
) -> None:
    des.send("room", value)
    run()
    assert resume("room", 0) == [(1, text)]


@pytest.mark.parametrize("text", ["plain", "two\nlines", '{"a": 1}', '"quoted"', "", "é"])
def test_text_sent_with_json_encode_off_stays_unchanged(des: DjangoEventstream, text: str) -> None:
    des.send("room", text, json_encode=False)
    run()
    assert resume("room", 0) == [(1, text)]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [((), {"a": "b"}), ((), [1]), ((), None)]
    + [(("--before-4.4",), value) for value in ({"a": "b"}, [1], None, "text", "")],
)
def test_events_stored_before_4_4_are_carried_over(
    des: DjangoEventstream, arguments: tuple[str, ...], value: Any
) -> None:
    des.store("room", "message", json.dumps(value))
    run(*arguments)
    assert resume("room", 0) == [(1, json.dumps(value))]


@pytest.mark.parametrize(
    ("type", "sent"), [("paid", "paid"), ("pa\r\nid", "paid"), ("\n", "message"), ("", "message")]
)
def test_event_type_is_what_clients_would_have_got(
    database: Database, des: DjangoEventstream, type: str, sent: str
) -> None:
    des.send("room", 1, type=type)
    run()
    assert database.value("SELECT type FROM pg_eventstream_event") == sent


@pytest.mark.parametrize("type", ["stream-error", "keep-\nalive"])
def test_event_by_which_the_server_would_speak_is_left_where_it_is(
    database: Database, des: DjangoEventstream, type: str
) -> None:
    des.send("room", 1)
    des.send("room", 2, type=type)
    des.send("room", 3)
    assert "1 events to resume from" in run()
    assert resume("room", 1) is None  # a reset, because the next event is missing
    assert resume("room", 2) == [(3, "3")]


def test_too_old_an_id_gets_a_stream_reset(des: DjangoEventstream) -> None:
    des.send("room", 1, 2, ago=25 * HOUR)
    des.send("room", 3, ago=23 * HOUR)
    assert "1 events to resume from" in run()
    assert resume("room", 0) is None
    assert resume("room", 1) is None
    assert resume("room", 2) == [(3, "3")]
    assert resume("room", 3) == []


def test_channel_without_young_events_continues_counting(
    database: Database, des: DjangoEventstream
) -> None:
    des.send("room", 1, 2, ago=25 * HOUR)
    des.count("older", 57)
    des.count("never", 0)
    assert run().splitlines()[-1] == "2 channels imported, with 0 events to resume from."
    for channel in ("room", "older", "never"):
        send_event(channel, "message", "new")
    sequence(database)
    assert resume("room", 2) == [(3, '"new"')]
    assert resume("room", 1) is None
    assert resume("older", 57) == [(58, '"new"')]
    assert resume("never", 0) == [(1, '"new"')]


def test_only_events_after_the_last_gap_can_be_resumed_from(des: DjangoEventstream) -> None:
    des.send("room", *range(1, 8))
    des.execute("DELETE FROM django_eventstream_event WHERE eid IN (2, 5)")
    des.send("torn", 1, 2)
    des.execute("DELETE FROM django_eventstream_event WHERE channel = 'torn' AND eid = 2")
    said = run()
    assert "2 channels imported, with 2 events to resume from." in said
    assert "4 events left out, because a later event of their channel is missing." in said
    assert resume("room", 4) is None
    assert resume("room", 5) == [(6, "6"), (7, "7")]
    assert resume("torn", 1) is None
    assert resume("torn", 2) == []


def test_no_id_is_given_out_again(database: Database, des: DjangoEventstream) -> None:
    """The counter is behind its events, or missing."""
    des.send("behind", 1, 2, 3)
    des.execute("UPDATE django_eventstream_eventcounter SET value = 1")
    des.send("gone", 1, 2)
    des.execute("DELETE FROM django_eventstream_eventcounter WHERE name = 'gone'")
    assert "2 channels imported, with 5 events" in run()
    send_event("behind", "message", "new")
    send_event("gone", "message", "new")
    sequence(database)
    assert resume("behind", 2) == [(3, "3"), (4, '"new"')]
    assert resume("gone", 1) == [(2, "2"), (3, '"new"')]


# Channels that have events here


def test_imported_events_are_pruned_on_time(database: Database, des: DjangoEventstream) -> None:
    des.send("room", 1, ago=23 * HOUR)
    des.send("room", 2, ago=22 * HOUR)
    des.send("room", 3)
    run()
    with override_settings(EVENTSTREAM_RETENTION=22 * HOUR + HOUR / 2):
        call_command("eventstream_prune", stdout=StringIO())
    assert resume("room", 0) is None
    assert resume("room", 1) == [(2, "2"), (3, "3")]
    prune()
    assert resume("room", 2) is None
    assert resume("room", 3) == []
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0
    send_event("room", "message", "new")
    sequence(database)
    assert resume("room", 3) == [(4, '"new"')]


@pytest.mark.parametrize("retention", [None, timedelta(days=365_000)])
def test_events_of_any_age_are_imported_if_all_are_kept(
    database: Database, des: DjangoEventstream, retention: timedelta | None
) -> None:
    des.send("room", 1, ago=300 * 24 * HOUR)
    des.send("room", 2)
    with override_settings(EVENTSTREAM_RETENTION=retention):
        run()
        call_command("eventstream_prune", stdout=StringIO())
    assert resume("room", 0) == [(1, "1"), (2, "2")]


def test_clocks_that_disagree_change_no_order(des: DjangoEventstream) -> None:
    des.send("room", 1, ago=-2 * HOUR)
    des.send("room", 2, ago=2 * HOUR)
    des.send("room", 3, ago=HOUR)
    run()
    assert resume("room", 0) == [(1, "1"), (2, "2"), (3, "3")]
    prune()
    assert resume("room", 2) is None
    assert resume("room", 3) == []


def test_imported_events_are_never_published(database: Database, des: DjangoEventstream) -> None:
    des.send("room", 1, 2, 3)
    with ControlPort() as control, override_settings(GRIP_URL=control.url):
        run()
        assert publish_once() == 0
        send_event("room", "message", "new")
        assert publish_once() == 1
    assert [(item["id"], item["prev-id"]) for item in control.items if "id" in item] == [("4", "3")]


@pytest.mark.parametrize("first", [True, False])
def test_imported_events_are_never_sequenced(
    database: Database, des: DjangoEventstream, first: bool
) -> None:
    if not first:
        send_event("else", "message", 1)
        sequence(database)
    des.send("room", 1, 2, 3)
    run()
    before = everything(database)
    in_outbox = "SELECT count(*) FROM pg_eventstream_outbox WHERE channel = 'room'"
    assert database.value(in_outbox) == 0
    assert database.value("SELECT pg_eventstream_sequence()") == 0
    assert everything(database)[2] == before[2]
    # Restored elsewhere, rows first: the trigger put them into the outbox again.
    database.execute("UPDATE pg_eventstream_cursor SET cluster = cluster + 1")
    database.execute(
        "INSERT INTO pg_eventstream_outbox (xid, event_id, channel)"
        " SELECT '3', id, channel FROM pg_eventstream_event WHERE channel = 'room'"
    )
    assert database.value("SELECT pg_eventstream_sequence()") == 0
    assert everything(database)[2] == before[2]


def test_no_process_is_woken_for_imported_events(
    database: Database, des: DjangoEventstream
) -> None:
    des.send("room", 1, 2, 3)
    with database.connect() as listener, database.connect() as sender:
        rang: list[int] = []
        listener.add_notify_handler(lambda notify: rang.append(notify.pid))
        listener.execute("LISTEN pg_eventstream")
        run()
        sender.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('room', '4')")

        def heard() -> bool:
            listener.execute("SELECT 1")
            return bool(rang)

        wait_until(heard, timeout=20)
        assert rang == [sender.info.backend_pid]


def test_events_that_wait_to_be_sequenced_come_after(
    database: Database, des: DjangoEventstream
) -> None:
    des.send("room", 1, 2)
    send_event("room", "message", "new")
    assert "1 channels imported" in run()
    sequence(database)
    assert resume("room", 1) == [(2, "2"), (3, '"new"')]


def test_second_import_changes_nothing(database: Database, des: DjangoEventstream) -> None:
    des.send("a", 1, 2)
    des.count("b", 3)
    run()
    before = everything(database)
    said = run()
    assert "0 channels imported, with 0 events" in said
    assert "2 channels left unchanged, because they already have events here" in said
    assert "imported or new: 'a', 'b'." in said
    assert everything(database) == before


def test_channel_with_events_here_stays_unchanged_and_the_others_are_imported(
    database: Database, des: DjangoEventstream
) -> None:
    des.send("both", 1, 2, 3)
    des.send("old", 1, 2)
    send_event("both", "message", "new")
    sequence(database)
    said = run()
    assert "1 channels imported, with 2 events" in said
    assert "1 channels left unchanged" in said
    assert resume("both", 0) == [(1, '"new"')]
    assert resume("old", 0) == [(1, "1"), (2, "2")]


def test_two_databases_can_be_imported_one_after_the_other(
    database: Database, des: DjangoEventstream, sqlite: DjangoEventstream
) -> None:
    des.send("a", 1, 2)
    sqlite.send("b", 1, 2)
    run()
    run("--from", "old")
    assert resume("a", 0) == resume("b", 0) == [(1, "1"), (2, "2")]
    assert database.fetch("SELECT position FROM pg_eventstream_stream ORDER BY 1") == [
        (-3,), (-2,), (-1,), (0,),
    ]  # fmt: skip


def test_times_are_right_without_time_zones(database: Database, sqlite: DjangoEventstream) -> None:
    with override_settings(USE_TZ=False, TIME_ZONE="America/New_York"):
        local = datetime.now() - 23 * HOUR
        sqlite.count("room", 1, local)
        sqlite.insert("room", "message", '"1"', 1, local)
        assert "1 events to resume from" in run("--from", "old")
    age = database.value("SELECT now() - sequenced_at FROM pg_eventstream_stream")
    assert abs(age - 23 * HOUR) < timedelta(minutes=5)
    assert abs(database.value("SELECT now() - created FROM pg_eventstream_event") - age) < HOUR / 9


# What cannot be imported


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "must not be empty"),
        ("a\r\nb", "must not contain CR, LF or NUL"),
        ("a\0b", "must not contain CR, LF or NUL"),
        ("x" * 256, "the limit is 255"),
        ("pg_eventstream:x", "reserved"),
    ],
)
def test_channel_that_cannot_exist_here_is_left_out_and_named(
    database: Database, sqlite: DjangoEventstream, name: str, reason: str
) -> None:
    sqlite.send(name, 1)
    sqlite.send("room", 1)
    said = run("--from", "old")
    assert "1 channels imported, with 1 events" in said
    assert f"Channel {name!r} left out: " in said
    assert reason in said
    assert "missing" not in said
    assert database.fetch("SELECT name FROM pg_eventstream_channel") == [("room",)]


@pytest.mark.parametrize(
    ("type", "stored"),
    [
        ("message", json.dumps("NUL \0 in text")),
        ("message", json.dumps("half a \ud800 character")),
        ("message", '"not JSON'),
        ("x" * 256, json.dumps("1")),
    ],
)
def test_event_that_cannot_be_stored_here_counts_as_missing(
    sqlite: DjangoEventstream, type: str, stored: str
) -> None:
    sqlite.send("room", 1)
    sqlite.store("room", type, stored)
    sqlite.send("room", 3)
    said = run("--from", "old")
    assert "1 events count as missing" in said
    assert "1 events left out" in said
    assert resume("room", 1) is None
    assert resume("room", 2) == [(3, "3")]


def test_dry_run_says_the_same_and_writes_nothing(
    database: Database, des: DjangoEventstream
) -> None:
    des.send("a", 1, 2)
    des.send("b", 1)
    before = everything(database)
    assert run("--dry-run") == "2 channels would be imported, with 3 events to resume from.\n"
    assert everything(database) == before
    assert "2 channels imported, with 3 events" in run()


def test_import_that_fails_leaves_nothing(database: Database, des: DjangoEventstream) -> None:
    des.send("a", 1)
    des.send("b", 1)
    before = everything(database)
    database.execute(
        "ALTER TABLE pg_eventstream_channel ADD CONSTRAINT nothing_but_a CHECK (name = 'a')"
    )
    with pytest.raises(CommandError, match="nothing_but_a"):
        run()
    assert everything(database) == before


def test_senders_do_not_wait_and_the_sequence_does(
    database: Database, des: DjangoEventstream
) -> None:
    des.send("room", 1, 2)
    with database.connect() as holder, database.connect() as sender:
        # An import that takes long is stopped when it writes its first channel.
        holder.execute("SELECT pg_advisory_lock(4711)")
        holder.execute(
            "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NEW; END $$"
        )
        holder.execute(
            "CREATE TRIGGER pause BEFORE INSERT ON pg_eventstream_channel"
            " FOR EACH ROW EXECUTE FUNCTION pause()"
        )
        said: list[str] = []

        def work() -> None:
            try:
                said.append(run())
            finally:
                connections.close_all()

        importing = threading.Thread(target=work)
        importing.start()
        try:
            wait_until(
                lambda: bool(
                    database.value(
                        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
                        "   AND objid = 4711 AND NOT granted"
                    )
                ),
                timeout=20,
            )
            sender.execute("SET lock_timeout = '1s'")
            sender.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('room', '3')")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                sender.execute("SELECT pg_eventstream_sequence()")
        finally:
            holder.execute("SELECT pg_advisory_unlock(4711)")
            importing.join(20)
    assert "1 channels imported, with 2 events" in said[0]
    assert database.value("SELECT pg_eventstream_sequence()") == 1
    assert resume("room", 0) == [(1, "1"), (2, "2"), (3, "3")]


def test_missing_tables_of_django_eventstream_are_explained(database: Database) -> None:
    with pytest.raises(
        CommandError, match=r"nothing to import: .*django_eventstream_event .*--from"
    ):
        run()


@pytest.mark.parametrize("option", ["--from", "--database"])
def test_unknown_database_is_explained(database: Database, option: str) -> None:
    with pytest.raises(CommandError, match="database 'nowhere' is not in DATABASES"):
        run(option, "nowhere")


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_missing_migrations_are_explained(
    database: Database, des: DjangoEventstream, arguments: tuple[str, ...]
) -> None:
    des.send("room", 1)
    database.execute("DROP TABLE pg_eventstream_channel, pg_eventstream_cursor")
    with pytest.raises(CommandError, match=r"(?s)does not exist.*\(manage.py migrate\)"):
        run(*arguments)
