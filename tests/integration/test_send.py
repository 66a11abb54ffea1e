"""send_event and its variants: one statement, in the caller's transaction, or InvalidEvent."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.db import DataError, connection, connections, models, transaction
from django.test import override_settings
from django.test.utils import CaptureQueriesContext
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy

from pg_eventstream import (
    EventStreamError,
    InvalidEvent,
    NewEvent,
    asend_event,
    send_event,
    send_events,
)
from tests.support.database import Database


class Kind(models.TextChoices):
    GREETING = "greeting-value"


def events(database: Database, *columns: str) -> list[tuple[Any, ...]]:
    names = ", ".join(columns or ("channel", "type", "data", "skip_user_ids"))
    return database.fetch(f"SELECT {names} FROM pg_eventstream_event ORDER BY id")


def sequenced(database: Database) -> list[str]:
    """The data of committed events, in the order of delivery."""
    database.execute("SELECT pg_eventstream_sequence()")
    return [
        data
        for (data,) in database.fetch(
            "SELECT e.data FROM pg_eventstream_stream s"
            " JOIN pg_eventstream_event e ON e.id = s.event_id ORDER BY s.position"
        )
    ]


@pytest.fixture
def other(postgres: Any, database: Database) -> Iterator[Database]:
    """A second database, under the alias ``other``."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres.dsn(), autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} TEMPLATE template_migrated")
    connections.settings["other"] = {**connections.settings["default"], "NAME": name}
    try:
        yield Database(postgres, name)
    finally:
        connections["other"].close()
        del connections["other"], connections.settings["other"]
        with psycopg.connect(postgres.dsn(), autocommit=True) as server:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")


# One statement, in the caller's transaction


def send_one(data: str) -> None:
    send_event("c", "t", data, json_encode=False)


def asend_one(data: str) -> None:
    async_to_sync(asend_event)("c", "t", data, json_encode=False)


def send_two(data: str) -> None:
    send_events([NewEvent("c", "t", f"{data}{n}", json_encode=False) for n in ("", "+")])


@pytest.mark.parametrize("send", [send_one, send_two])
@pytest.mark.parametrize("atomic", [False, True])
def test_sending_is_exactly_one_statement(
    database: Database, send: Callable[[str], None], atomic: bool
) -> None:
    connection.ensure_connection()
    if atomic:
        with transaction.atomic(), CaptureQueriesContext(connection) as queries:
            send("x")
    else:
        with CaptureQueriesContext(connection) as queries:
            send("x")
    (query,) = queries.captured_queries
    assert query["sql"].strip().startswith("INSERT INTO pg_eventstream_event")


def test_sending_asynchronously_is_exactly_one_statement(database: Database) -> None:
    connection.ensure_connection()
    with CaptureQueriesContext(connection) as queries:
        asend_one("x")
    (query,) = queries.captured_queries
    assert query["sql"].startswith("INSERT INTO pg_eventstream_event")
    assert events(database, "data") == [("x",)]


def test_sending_nothing_is_no_statement(database: Database) -> None:
    connection.ensure_connection()
    with CaptureQueriesContext(connection) as queries:
        send_events([])
        send_events(iter(()))
    assert queries.captured_queries == []


@pytest.mark.parametrize("send", [send_one, asend_one, send_two])
def test_event_is_there_if_and_only_if_the_block_commits(
    database: Database, send: Callable[[str], None]
) -> None:
    with transaction.atomic():
        send("kept")
        assert sequenced(database) == []  # no other session sees it yet
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            send("rolled back to the savepoint")
            raise ZeroDivisionError
        with transaction.atomic():
            send("kept, too")
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        send("rolled back")
        raise ZeroDivisionError
    with transaction.atomic():
        send("set to be rolled back")
        transaction.set_rollback(True)
    assert [data for data in sequenced(database) if "+" not in data] == ["kept", "kept, too"]


@pytest.mark.parametrize("send", [send_one, asend_one, send_two])
def test_without_a_transaction_the_event_is_there_at_once(
    database: Database, send: Callable[[str], None]
) -> None:
    send("x")
    assert "x" in sequenced(database)


def test_sending_in_a_broken_transaction_fails_as_every_statement_does(database: Database) -> None:
    with transaction.atomic():
        with pytest.raises(DataError), transaction.atomic():
            connection.cursor().execute("SELECT 1 / 0")
        transaction.set_rollback(True)
        with pytest.raises(transaction.TransactionManagementError):
            send_one("x")
    assert events(database) == []


# Order


def test_events_of_one_call_keep_their_order(database: Database) -> None:
    """Far more than the parameters of one statement, of which 65,535 are allowed."""
    count = 70_000
    send_events((f"c{n % 7}", "t", n) for n in range(count))
    with database.connect() as server:
        ids = server.execute("SELECT data::int FROM pg_eventstream_event ORDER BY id").fetchall()
        while server.execute("SELECT pg_eventstream_sequence()").fetchone() != (0,):
            pass
        positions = server.execute(
            "SELECT e.data::int FROM pg_eventstream_stream s"
            " JOIN pg_eventstream_event e ON e.id = s.event_id ORDER BY s.position"
        ).fetchall()
    assert ids == positions == [(n,) for n in range(count)]


def test_ways_to_send_may_be_mixed_and_keep_their_order(database: Database) -> None:
    with transaction.atomic():
        send_event("a", "t", 1)
        send_events([("b", "t", 2), NewEvent("a", "t", 3)])
        async_to_sync(asend_event)("b", "t", 4)
        send_event("a", "t", 5)
    assert sequenced(database) == ["1", "2", "3", "4", "5"]


# What is written


def test_event_is_written_as_given(database: Database) -> None:
    send_event("room 1: ä,%", "greeting", {"text": "hello"})
    send_event("c", "t", "two\nlines, 100 %s", skip_user_ids=[1, "2"], json_encode=False)
    send_events(
        [
            ("c", "t", {"n": 1}),
            ("c", "t", [], [3, "b,c", 'd"e\\']),
            ("c", "t", "plain", None, False),
            NewEvent("c", "t", "plain", skip_user_ids=[], json_encode=False),
        ]
    )
    async_to_sync(asend_event)("c", "t", None, [4], True)
    assert events(database) == [
        ("room 1: ä,%", "greeting", '{"text": "hello"}', []),
        ("c", "t", "two\nlines, 100 %s", ["1", "2"]),
        ("c", "t", '{"n": 1}', []),
        ("c", "t", "[]", ["3", "b,c", 'd"e\\']),
        ("c", "t", "plain", []),
        ("c", "t", "plain", []),
        ("c", "t", "null", ["4"]),
    ]


METAS: list[dict[str, Any] | None] = [
    None,
    {},
    {"correlation_id": "order-7", "version": 2, "nested": {"list": [1, None, True]}},
    {"text": "ä 🎉 % \\ \\u0000 \n\" '"},
]


@pytest.mark.parametrize("skip", [None, ["7"]])
@pytest.mark.parametrize("meta", METAS, ids=str)
def test_meta_is_stored_in_each_way_to_send(
    database: Database, meta: dict[str, Any] | None, skip: list[str] | None
) -> None:
    send_event("c", "t", 1, skip, meta=meta)
    async_to_sync(asend_event)("c", "t", 1, skip, meta=meta)
    send_events([NewEvent("c", "t", 1, skip, meta=meta), ("c", "t", 1, skip, True, meta)])
    assert events(database, "skip_user_ids", "meta") == [(skip or [], meta)] * 4


def test_meta_takes_what_data_takes(database: Database) -> None:
    send_event("c", "t", 1, meta={"user": USER, "price": Decimal("1.10"), "on": date(2026, 1, 2)})
    stored = {"user": str(USER), "price": "1.10", "on": "2026-01-02"}
    assert events(database, "meta") == [(stored,)]


def test_events_with_and_without_meta_can_be_sent_in_one_call(database: Database) -> None:
    send_events([("c", "t", 1), NewEvent("c", "t", 2, meta={"a": 1}), ("c", "t", 3)])
    assert events(database, "data", "meta") == [("1", None), ("2", {"a": 1}), ("3", None)]


USER = uuid.UUID("0d9f6a2e-8d5c-4f0b-9a57-5f4a2d3b1c0e")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc), '"2026-01-02T03:04:05.678Z"'),
        (date(2026, 1, 2), '"2026-01-02"'),
        (timedelta(hours=1), '"P0DT01H00M00S"'),
        (Decimal("1.10"), '"1.10"'),
        (USER, f'"{USER}"'),
        (gettext_lazy("hello"), '"hello"'),
        ({"nested": [gettext_lazy("hello"), Decimal(1)]}, '{"nested": ["hello", "1"]}'),
        ("ä\n\0 \ud800", r'"\u00e4\n\u0000 \ud800"'),
        (Kind.GREETING, '"greeting-value"'),
        (1.5, "1.5"),
        (None, "null"),
    ],
)
def test_data_is_written_as_django_writes_json(database: Database, data: Any, text: str) -> None:
    send_event("c", "t", data)
    send_events([("c", "t", data)])
    assert events(database, "data") == [(text,), (text,)]


def test_text_that_is_not_json_is_written_unchanged(database: Database) -> None:
    texts = ["", "{not json", "a\r\nb\rc\nd", "\u2028\x85", "\x01\x1b", "😀", "null"]
    for text in texts:
        send_event("c", "t", text, json_encode=False)
    send_events([("c", "t", text, None, False) for text in texts])
    assert events(database, "data") == [(text,) for text in [*texts, *texts]]


def test_subclasses_of_str_are_strings(database: Database) -> None:
    send_event(mark_safe("c"), Kind.GREETING, mark_safe("<b>"), json_encode=False)
    send_events([(mark_safe("c"), Kind.GREETING, mark_safe("<b>"), None, False)])
    assert events(database) == [("c", "greeting-value", "<b>", [])] * 2


def test_users_to_skip_may_be_any_iterable_of_keys(database: Database) -> None:
    for users in ([USER], (USER,), {USER}, iter([USER]), {USER: "a name"}, models_keys()):
        send_event("c", "t", 1, skip_user_ids=users)
        assert events(database, "skip_user_ids")[-1] == ([str(USER)],)
    send_events([("c", "t", 1, models_keys())])
    assert events(database, "skip_user_ids")[-1] == ([str(USER)],)


def models_keys() -> Iterator[object]:
    yield USER


def test_longest_names_are_accepted(database: Database) -> None:
    longest = "ä" * 255
    send_event(longest, longest, 1)
    send_events([(longest, longest, 2)])
    assert events(database, "channel", "type") == [(longest, longest)] * 2


# Where it is written


def test_event_goes_to_the_database_that_is_asked_for(database: Database, other: Database) -> None:
    send_event("c", "t", 1, using="other")
    send_events([("c", "t", 2)], using="other")
    async_to_sync(asend_event)("c", "t", 3, using="other")
    with override_settings(EVENTSTREAM_DATABASE="other"):
        send_event("c", "t", 4)
        send_events([("c", "t", 5)])
        async_to_sync(asend_event)("c", "t", 6)
        send_event("c", "t", 7, using="default")
    assert events(other, "data") == [(str(n),) for n in range(1, 7)]
    assert events(database, "data") == [("7",)]


def test_event_belongs_to_the_transaction_of_its_database(
    database: Database, other: Database
) -> None:
    with pytest.raises(ZeroDivisionError), transaction.atomic(using="other"):
        send_event("c", "t", "rolled back", using="other")
        send_event("c", "t", "kept", using="default")
        raise ZeroDivisionError
    assert events(other, "data") == []
    assert events(database, "data") == [('"kept"',)]


# What cannot be sent


ENDLESS: list[Any] = []


ENDLESS.append(ENDLESS)


INVALID: dict[str, tuple[Any, ...]] = {
    "channel is empty": ("", "t", 1),
    "channel is too long": ("c" * 256, "t", 1),
    "channel is not a string": (1, "t", 1),
    "channel is missing": (None, "t", 1),
    "channel is bytes": (b"c", "t", 1),
    "channel is lazy": (gettext_lazy("c"), "t", 1),
    "channel with CR": ("a\rb", "t", 1),
    "channel with LF": ("a\n", "t", 1),
    "channel with NUL": ("a\0b", "t", 1),
    "channel with a lone surrogate": ("\ud800", "t", 1),
    "type is empty": ("c", "", 1),
    "type is too long": ("c", "t" * 256, 1),
    "type is not a string": ("c", 1, 1),
    "type is missing": ("c", None, 1),
    "type with CR": ("c", "\rt", 1),
    "type with LF": ("c", "t\nid: 7", 1),
    "type with NUL": ("c", "\0", 1),
    "type with a lone surrogate": ("c", "\udfff", 1),
    "data is NaN": ("c", "t", float("nan")),
    "data is infinite": ("c", "t", {"n": [float("-inf")]}),
    "data is no JSON": ("c", "t", object()),
    "data has a key that is no JSON": ("c", "t", {(1, 2): 3}),
    "data contains itself": ("c", "t", ENDLESS),
    "raw data is not a string": ("c", "t", {"n": 1}, None, False),
    "raw data is bytes": ("c", "t", b"bytes", None, False),
    "raw data is missing": ("c", "t", None, None, False),
    "raw data with NUL": ("c", "t", "a\0b", None, False),
    "raw data with a lone surrogate": ("c", "t", "a\ud800", None, False),
    "user ids are one string": ("c", "t", 1, "123"),
    "user ids are bytes": ("c", "t", 1, b"123"),
    "user ids are one number": ("c", "t", 1, 123),
    "user id with NUL": ("c", "t", 1, ["a\0b"]),
    "user id with a lone surrogate": ("c", "t", 1, ["\ud800"]),
    **{
        f"meta {what}": ("c", "t", 1, None, True, meta)
        for what, meta in {
            "is a string": "v1",
            "is a list": ["v1"],
            "is not JSON": {"a": object()},
            "is not a number": {"a": float("nan")},
            "has a key that is no string": {1: "a"},
            "has a nested key that is no JSON": {"a": {(1, 2): 3}},
            "contains itself": {"a": ENDLESS},
            "contains NUL": {"a": ["\\", "b\0"]},
            "has a key with NUL": {"a\0": 1},
            "contains a lone surrogate": {"a": "\ud800"},
        }.items()
    },
}


def send(*event: Any) -> None:
    send_event(**NewEvent(*event)._asdict())


def asend(*event: Any) -> None:
    async_to_sync(asend_event)(**NewEvent(*event)._asdict())


def send_among_others(*event: Any) -> None:
    send_events([("c", "t", "before"), event, ("c", "t", "after")])


def outcome(how: Callable[..., None], event: tuple[Any, ...]) -> str:
    """The result of sending an event: the error's name, and whether a statement was run."""
    error = "none"
    with CaptureQueriesContext(connection) as queries:
        try:
            with transaction.atomic():
                how(*event)
        except Exception as e:  # noqa: BLE001  (whichever: it is compared)
            error = type(e).__name__
    inserted = any("INSERT" in str(query["sql"]) for query in queries.captured_queries)
    return f"{error}, inserted" if inserted else error


@pytest.mark.parametrize("how", [send, asend, send_among_others])
def test_invalid_event_is_refused_and_the_transaction_continues(
    database: Database, how: Callable[..., None]
) -> None:
    with transaction.atomic():
        send_event("c", "t", "kept")
        outcomes = {name: outcome(how, event) for name, event in INVALID.items()}
        send_event("c", "t", "kept, too")
    assert {name: error for name, error in outcomes.items() if error != "InvalidEvent"} == {}
    assert events(database, "data") == [('"kept"',), ('"kept, too"',)]


def test_invalid_event_does_not_break_a_transaction_without_a_savepoint(
    database: Database,
) -> None:
    with transaction.atomic():
        with pytest.raises(InvalidEvent):
            send_event("", "t", 1)
        send_event("c", "t", "kept")
    assert events(database, "data") == [('"kept"',)]


def test_refusal_says_what_is_wrong_and_is_a_value_error(database: Database) -> None:
    assert issubclass(InvalidEvent, ValueError)
    assert issubclass(InvalidEvent, EventStreamError)
    for event, message in [
        (("a\nb", "t", 1), r"channel 'a\\nb' must not contain CR, LF or NUL"),
        (("c", "t" * 300, 1), "event type has 300 characters; the limit is 255"),
        (("c", "t", {1, 2}), "set is not JSON serializable.*json_encode=False"),
        (("c", "t", 1, "abc"), "list of user ids, not the string 'abc'"),
        (("c", "t", 1, None, False), "json_encode=False the data must be a string, not int"),
    ]:
        with pytest.raises(InvalidEvent, match=message):
            send(*event)


def test_events_that_fail_to_arrive_from_their_source_are_not_sent_in_part(
    database: Database,
) -> None:
    def source() -> Iterator[NewEvent]:
        yield NewEvent("c", "t", 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        send_events(source())
    assert events(database) == []


def test_users_can_be_skipped_as_objects_too(database: Database) -> None:
    ann, bob = (User.objects.create_user(name) for name in ("ann", "bob"))
    send_event("c", "t", 1, skip_user_ids=User.objects.order_by("pk"))
    send_events([("c", "t", 1, [ann, bob.pk])])
    expected = ([str(ann.pk), str(bob.pk)],)
    assert database.fetch("SELECT skip_user_ids FROM pg_eventstream_event") == [expected] * 2


def test_tuple_that_is_no_event_is_refused_with_what_it_should_be(database: Database) -> None:
    for wrong in (("c", "t"), ("c", "t", 1, None, True, None, "more"), ()):
        with pytest.raises(InvalidEvent, match=r"must be a tuple \(channel, event_type, data"):
            send_events([wrong])


def test_callers_of_django_eventstream_may_still_pass_async_publish(database: Database) -> None:
    send_event("c", "t", "<b>", None, False, False)
    send_event("c", "t", 1, async_publish=False)
    async_to_sync(asend_event)("c", "t", "<i>", [], False, json_encode=False)
    assert database.fetch("SELECT data FROM pg_eventstream_event ORDER BY id") == [
        ("<b>",),
        ("1",),
        ("<i>",),
    ]


def test_data_arrives_as_one_json_document(database: Database) -> None:
    """Line breaks inside strings are escaped, so that the data is one line of the stream."""
    send_event("c", "t", {"text": "a\nb\r\nc\u2028d"})
    ((data,),) = events(database, "data")
    assert len(data.splitlines()) == 1
    assert json.loads(data) == {"text": "a\nb\r\nc\u2028d"}


def test_two_phase_commit_is_refused_and_writes_nothing(database: Database, channel: str) -> None:
    with database.connect() as connection:
        connection.execute("BEGIN")
        connection.execute(
            "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, '1')", [channel]
        )
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="NOTIFY"):
            connection.execute("PREPARE TRANSACTION 'two-phase'")
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0
