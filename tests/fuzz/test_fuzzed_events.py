"""Events with any content: clients get exactly what was sent, by every path."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import example, given, note
from hypothesis import strategies as st

from pg_eventstream import get_current_event_id, send_event, send_events, sse
from pg_eventstream.channels import PERMISSION_CHANGES, RESERVED
from pg_eventstream.errors import InvalidEvent, InvalidRequest, ResumeNotAllowed
from pg_eventstream.grip import items
from pg_eventstream.grip.names import escape, events_channel, quote_user
from pg_eventstream.stream_event import StreamEvent, decode
from pg_eventstream.streams import direct
from pg_eventstream.streams.subscription import Batch
from tests.fuzz.hostile import SEED, Parsed, fuzzed, parse_strictly, storable, texts
from tests.support.database import Database
from tests.support.origin import Origin, behind_a_proxy
from tests.support.rounds import sequence

pytestmark = pytest.mark.faults

#: Valid names of channels and types.
names = storable.map(lambda text: re.sub("[\r\n]", "", text)[:255]).filter(
    lambda name: name != "" and not name.startswith(RESERVED)
)


def is_for_applications(kind: str) -> bool:
    """The server's own types of events are tested elsewhere."""
    return kind not in sse.RESERVED_TYPES


# Type, data, its repetitions, and the users to skip.
drafts = st.tuples(
    names.filter(is_for_applications),
    storable,
    st.sampled_from([1, 1, 1, 70]),
    st.lists(storable, max_size=3),
)


def as_lines(data: str) -> str:
    """The data on the wire, where all kinds of line breaks become the same."""
    return re.sub("\r\n|\r", "\n", data)


@pytest.fixture
def connection(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with database.connect() as connection, behind_a_proxy:
        yield connection


@fuzzed(80, 600)
@given(names, st.lists(drafts, min_size=1, max_size=4), st.booleans())
def test_client_and_proxy_parse_exactly_what_was_sent(
    database: Database,
    connection: psycopg.Connection[Any],
    channel: str,
    drafts: list[tuple[str, str, int, list[str]]],
    in_sql: bool,
) -> None:
    note(SEED)
    events = [(kind, data * times, skipped) for kind, data, times, skipped in drafts]
    before = get_current_event_id([channel])
    if in_sql:
        insert = "INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids)"
        with connection.cursor() as cursor:
            cursor.executemany(f"{insert} VALUES (%s, %s, %s, %s)", [(channel, *e) for e in events])
    else:
        send_events([(channel, kind, data, skipped, False) for kind, data, skipped in events])
    sequence(database)
    eid = sse.parse_id(before, [channel])[channel]
    expected = [
        Parsed(kind, as_lines(data), sse.make_id({channel: eid + n}))
        for n, (kind, data, _) in enumerate(events, 1)
    ]
    # To a client that reconnects, page by page ...
    answer = Origin().open(channel, last_event_id=before)
    pages = [answer.body]
    while not answer.held:
        answer = Origin().follow(answer)
        pages.append(answer.body)
    stream = "".join(map(filtered, pages))
    assert parse_strictly(stream)[1:] == expected  # after stream-open
    # ... and live, to the proxy.
    for item, (kind, _, skipped), event in zip(
        published(connection, channel, eid), events, expected, strict=True
    ):
        assert item["channel"] == events_channel(channel)
        assert item["id"] == str(int(item["prev-id"]) + 1)
        users = item["meta"]["skip_users"].split(",")
        assert users == [quote_user(user) for user in skipped or [""]]
        content = item["formats"]["http-stream"]["content"]
        (parsed,) = parse_strictly(filtered(content))
        assert (parsed.type, parsed.data, (parsed.id or "").strip()) == (kind, event.data, event.id)


def filtered(body: str) -> str:
    """The body after the proxy's build-id filter, on a stream of one channel."""
    return re.sub("%(.)", lambda found: {"%": "%", "I": " "}[found[1]], body, flags=re.DOTALL)


def published(connection: psycopg.Connection[Any], channel: str, after: int) -> list[Any]:
    """The items that the publisher makes of a channel's events, as the proxy parses them."""
    rows = connection.execute(
        """
        SELECT position, s.channel, eid, prev, type, data, skip_user_ids
          FROM pg_eventstream_stream s JOIN pg_eventstream_event e ON e.id = s.event_id
         WHERE s.channel = %s AND eid > %s ORDER BY position
        """,
        [channel, after],
    )
    bodies = [batch.body for batch in items.batches(decode(*row) for row in rows)]
    parsed = [item for body in bodies for item in json.loads(body)["items"]]
    for item in parsed:
        item.setdefault("meta", {"skip_users": ""})
    return parsed


any_names = st.one_of(texts, st.integers(253, 258).map("ä".__mul__), st.just("a\ud800"))


@fuzzed(80, 1500)
@given(any_names, any_names, st.one_of(texts, st.just("\udfff")), st.lists(texts, max_size=2))
@example("a", "b", "c\0", [])
@example("a", "b\n", "c", [])
@example("a", "b", "c", ["\0"])
@example(f"{RESERVED}x", "b", "c", [])
def test_python_refuses_what_the_table_would_refuse_and_nothing_else(
    connection: psycopg.Connection[Any], channel: str, kind: str, data: str, skipped: list[str]
) -> None:
    note(SEED)
    try:
        send_event(channel, kind, data, skipped, json_encode=False)
        allowed = True
    except InvalidEvent:
        allowed = False
    try:
        connection.execute(
            "INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids)"
            " VALUES (%s, %s, %s, %s)",
            [channel, kind, data, skipped],
        )
        possible = True
    except (psycopg.errors.CheckViolation, psycopg.DataError, UnicodeEncodeError):
        possible = False
    assert allowed == (possible and not channel.startswith(RESERVED))


# The parts alone, with values that no database would store


@fuzzed(200, 3000)
@given(
    texts.filter(bool).filter(is_for_applications), texts, st.lists(names, max_size=3, unique=True)
)
def test_stream_without_a_proxy_parses_exactly_too(
    kind: str, data: str, channels: list[str]
) -> None:
    note(SEED)
    event_id = sse.make_id(dict.fromkeys(channels, 5))
    events = [(StreamEvent(5, channel, 5, 4, kind, data, []), event_id) for channel in channels]
    pieces = b"".join(direct._encode(Batch(events))).decode()
    safe = re.sub("[\r\n\0]", "", kind)
    assert parse_strictly(pieces.replace("\0", "")) == [
        Parsed(safe, as_lines(data.replace("\0", "")), event_id) for _ in channels
    ]


@fuzzed(200, 3000)
@given(st.dictionaries(texts.filter(bool), st.integers(0, 10**18 - 1), min_size=1, max_size=20))
def test_id_says_what_it_was_made_of(eids: dict[str, int]) -> None:
    note(SEED)
    made = sse.make_id(eids)
    assert sse.parse_id(made, eids) == eids
    assert sse.parse_id(f" {made},{made} ", eids) == eids  # as a proxy can send it
    assert re.fullmatch("[!-~]+", made)


@fuzzed(200, 3000)
@given(st.text(max_size=30) | texts)
def test_id_from_anywhere_is_parsed_or_refused(text: str) -> None:
    note(SEED)
    try:
        eids = sse.parse_id(text)
    except (InvalidRequest, ResumeNotAllowed):
        return
    assert all(name and 0 <= eid < 10**18 for name, eid in eids.items())


@fuzzed(200, 3000)
@given(st.lists(texts, max_size=4), texts)
def test_user_is_skipped_by_exactly_the_own_name(skipped: list[str], user: str) -> None:
    note(SEED)
    event = StreamEvent(1, "c", 1, 0, "message", "", skipped)
    meta = json.loads(items.item(event)).get("meta", {"skip_users": ""})["skip_users"]
    quoted = quote_user(user)
    assert (quoted in meta.split(",")) == (user in (skipped or [""]))
    assert re.fullmatch(r"[\w./~%-]*", quoted, re.ASCII)  # nothing that could end a header


@fuzzed(200, 3000)
@given(
    texts.filter(lambda channel: channel != PERMISSION_CHANGES),
    texts.filter(is_for_applications),
    texts,
)
def test_item_is_the_json_that_it_should_be(channel: str, kind: str, data: str) -> None:
    note(SEED)
    for reliable in (True, False):
        event = StreamEvent(7, channel, 7, 6, kind, data, [channel], reliable)
        ids = {"id": "7", "prev-id": "6"} if reliable else {"id": "7"}
        own_id = escape(sse.make_id({channel: 7})) + "%I" if reliable else None
        content = sse.encode_event(escape(kind), escape(data), own_id)
        users = quote_user(channel)
        assert json.loads(items.item(event, "prefix ")) == {
            "channel": "prefix " + events_channel(channel, reliable),
            **ids,
            **({"meta": {"skip_users": users}} if users else {}),
            "formats": {"http-stream": {"content": content}},
        }
