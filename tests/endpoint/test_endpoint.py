"""The endpoint as the proxy sees it: how streams are opened, resumed, reset and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import timedelta

import pytest
from django.db import connection
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from pg_eventstream import get_events, send_events, sse
from pg_eventstream.streams import replay
from tests.support.database import Database
from tests.support.origin import Origin, behind_a_proxy, signature
from tests.support.rounds import prune, sequence


@pytest.fixture(autouse=True)
def proxied(database: Database) -> Iterator[None]:
    with behind_a_proxy:
        yield


@pytest.fixture
def origin() -> Origin:
    return Origin()


def send(database: Database, channel: str, *data: str) -> None:
    send_events([(channel, "message", text, None, False) for text in data])
    sequence(database)


# Opening


def test_stream_opens_with_padding_and_headers_against_buffering_and_changes(
    origin: Origin, channel: str
) -> None:
    answer = origin.open(channel)
    assert answer.response["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.response["Cache-Control"] == "private, no-cache, no-store, no-transform"
    assert answer.response["X-Accel-Buffering"] == "no"
    assert answer.body.startswith(":" + " " * 2048 + "\n\nevent: stream-open\n")
    assert answer.held


@pytest.mark.parametrize("default", ["utf-8", "iso-8859-1", "utf-16"])
def test_every_stream_says_that_it_is_utf_8(
    database: Database, origin: Origin, channel: str, default: str
) -> None:
    """Clients that follow HTTP decode text without a charset as Latin-1, for example requests."""
    event = ("message", "✅ ü\u2028", None, False)
    with override_settings(DEFAULT_CHARSET=default):
        send_events([(channel, *event)])
        sequence(database)
        opened = origin.open(channel, last_event_id=f"{channel}:0")
        assert opened.data == ["✅ ü\u2028"]
        asked = origin.ask(opened.next_link, {"Grip-Last": f"events-{channel}; last-id=0"})
        assert asked.data == ["✅ ü\u2028"]
        answers = [
            *(opened, asked),
            origin.open(),  # bad-request
            origin.open("x" * 256),
            origin.open(channel, last_event_id="x"),
        ]
        with override_settings(
            EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.StaffOnly"
        ):
            answers.append(origin.open("staff ✅"))  # forbidden
        heads = [
            origin.head(path, headers={"Grip-Sig": signature()})
            for path in (f"/events/?channel={channel}", "/events/")
        ]
    for response in [answer.response for answer in answers] + heads:
        assert response["Content-Type"] == "text/event-stream; charset=utf-8"


def test_stream_open_carries_the_current_id_so_that_nothing_is_missed(
    database: Database, origin: Origin
) -> None:
    send(database, "news", "before")
    opened = origin.open("news", "quiet")
    assert opened.opened_at == {"news": 1, "quiet": 0}
    assert opened.events == []
    send(database, "news", "while away")
    send(database, "quiet", "the first ever")
    resumed = origin.open("news", "quiet", last_event_id=opened.control["stream-open"].id)
    assert resumed.data == ["while away", "the first ever"]
    assert "stream-reset" not in resumed.control


def test_proxy_is_told_to_send_a_keep_alive_every_20_seconds(origin: Origin, channel: str) -> None:
    header = origin.open(channel).response["Grip-Keep-Alive"]
    assert header == r"event: keep-alive\ndata:\n\n; format=cstring; timeout=20"


def test_proxy_is_told_when_to_ask_again(origin: Origin, channel: str) -> None:
    with override_settings(EVENTSTREAM_NEXT_LINK_TIMEOUT=77):
        assert origin.open(channel).response["Grip-Link"].endswith("; rel=next; timeout=77")


# Resuming


def test_resume_by_the_header_before_the_query_and_by_the_last_that_is_not_empty(
    database: Database, origin: Origin
) -> None:
    send(database, "c", "1", "2", "3", "4")
    assert origin.open("c", last_event_id="c:3").data == ["4"]
    assert origin.open("c", lastEventId=["c:2"]).data == ["3", "4"]
    assert origin.open("c", last_event_id="c:3", lastEventId=["c:1"]).data == ["4"]
    assert origin.open("c", last_event_id=" ", lastEventId=["c:1"]).data == ["2", "3", "4"]
    assert origin.open("c", lastEventId=["c:1", "c:3", "", " "]).data == ["4"]
    assert origin.open("c", lastEventId=["", " "]).opened_at == {"c": 4}


@pytest.mark.parametrize(
    ("last_event_id", "rest"),
    [
        ("c:3", ["4"]),
        ("c:3 ", ["4"]),  # as the proxy builds the id for a single channel
        ("c:3,c:2", ["4"]),  # as it builds it for several: own id, then all
        ("c:3,other:7,c:1", ["4"]),
        ("other:7, c:3", ["4"]),
        ("%63:3", ["4"]),
        ("c:4", []),
        ("c:0", ["1", "2", "3", "4"]),
        ("other:7", []),  # has no id of this channel: from now on
    ],
)
def test_resume_from_an_id_as_a_browser_sends_it_back(
    database: Database, origin: Origin, last_event_id: str, rest: list[str]
) -> None:
    send(database, "c", "1", "2", "3", "4")
    answer = origin.open("c", last_event_id=last_event_id)
    assert answer.data == rest
    assert "stream-reset" not in answer.control


def test_replay_merges_channels_in_commit_order_and_every_id_resumes(
    database: Database, origin: Origin
) -> None:
    sent = [(("a", "b", "c")[n * n % 7 % 3], str(n)) for n in range(60)]
    for name, text in sent:
        send(database, name, text)
    answer = origin.open("c", "b", "a", last_event_id="a:0,b:0,c:0")
    assert answer.data == [text for _, text in sent]
    for n in (0, 1, 17, 58):
        resumed = origin.open("a", "b", "c", last_event_id=answer.events[n].id)
        assert resumed.data == [text for _, text in sent[n + 1 :]]


def test_a_page_ends_where_the_next_begins(database: Database, origin: Origin) -> None:
    send_events([(f"c{n % 3}", "message", n) for n in range(2 * replay.PAGE_EVENTS + 7)])
    sequence(database)
    got: list[str] = []
    answer = origin.open("c0", "c1", "c2", last_event_id="c0:0,c1:0,c2:0")
    got += answer.data
    while not answer.held:
        answer = origin.follow(answer)
        assert "stream-open" not in answer.control
        got += answer.data
    assert got == [str(n) for n in range(2 * replay.PAGE_EVENTS + 7)]


@pytest.mark.parametrize("character", ["x", "%", "ü", "好", "🎉", "\n"])
def test_no_first_response_is_larger_than_the_proxy_takes(
    database: Database, origin: Origin, character: str
) -> None:
    for size in (10_000, 24_000, 33_000, 43_000, 46_000, 99_000, 1_000_000):
        channel = f"c{size}"
        sent = [character * size, "small"]
        send(database, channel, *sent)
        answer = origin.open(channel, last_event_id=f"{channel}:0")
        assert len(answer.response.content) < 100_000
        got = answer.data
        while not answer.held:
            answer = origin.follow(answer)
            got += answer.data
        assert got == sent


# Reset


def test_reset_when_what_is_asked_for_is_pruned(database: Database, origin: Origin) -> None:
    send(database, "old", "1", "2", "3")
    prune()
    send(database, "old", "4", "5")
    send(database, "new", "1")
    answer = origin.open("new", "old", last_event_id="new:0,old:2")
    reset = answer.control["stream-reset"]
    assert json.loads(reset.data) == {"channels": ["old"]}
    assert sse.parse_id(reset.id) == {"new": 0, "old": 5}
    assert [(event.data, event.eids) for event in answer.events] == [("1", {"new": 1, "old": 5})]
    # ... and from there the client resumes as if nothing had happened
    send(database, "old", "6")
    resumed = origin.open("new", "old", last_event_id=answer.events[-1].id)
    assert (resumed.data, list(resumed.control)) == (["6"], ["stream-open"])


def test_reset_when_the_id_is_from_the_future(database: Database, origin: Origin) -> None:
    send(database, "c", "1", "2")
    answer = origin.open("c", last_event_id="c:3")
    assert sse.parse_id(answer.control["stream-reset"].id) == {"c": 2}
    assert answer.events == []
    enormous = origin.open("c", last_event_id="c:" + "9" * 18)
    assert sse.parse_id(enormous.control["stream-reset"].id) == {"c": 2}


def test_no_reset_when_only_what_the_client_has_is_pruned(
    database: Database, origin: Origin
) -> None:
    send(database, "c", "1", "2", "3")
    prune()
    assert list(origin.open("c", last_event_id="c:3").control) == ["stream-open"]
    send(database, "c", "4")
    answer = origin.open("c", last_event_id="c:3")
    assert (answer.data, list(answer.control)) == (["4"], ["stream-open"])


def test_idle_channel_continues_counting_when_all_its_events_are_pruned(
    database: Database, origin: Origin
) -> None:
    send(database, "c", "1", "2", "3")
    prune()
    assert database.value("SELECT count(*) FROM pg_eventstream_stream") == 0
    assert origin.open("c").opened_at == {"c": 3}
    send(database, "c", "4")
    answer = origin.open("c", last_event_id="c:3")
    assert [event.id for event in answer.events] == ["c:4"]


def test_reset_in_the_middle_of_a_recovery(database: Database, origin: Origin) -> None:
    send_events([("c", "message", n) for n in range(replay.PAGE_EVENTS + 5)])
    sequence(database)
    first = origin.open("c", last_event_id="c:0")
    assert not first.held
    prune()
    send(database, "c", "after")
    second = origin.follow(first)
    assert sse.parse_id(second.control["stream-reset"].id) == {"c": replay.PAGE_EVENTS + 6}
    assert second.held


@override_settings(EVENTSTREAM_REPLAY_AGE=600)
@pytest.mark.parametrize("old", [0, 1, 4, 7])
def test_client_begins_no_further_back_than_the_replay_age(
    database: Database, origin: Origin, old: int
) -> None:
    sent = [str(n) for n in range(1, 8)]
    send(database, "c", *sent)
    database.execute(
        "UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 h' WHERE eid <= %s",
        [old],
    )
    for start in ("earliest", *(f"c:{eid}" for eid in range(8))):
        answer = origin.open("c", last_event_id=start)
        if start == "earliest":
            assert (answer.data, answer.opened_at) == (sent[old:], {"c": old})
        elif (eid := int(start[2:])) >= old or eid == len(sent):
            assert (answer.data, list(answer.control)) == (sent[eid:], ["stream-open"])
        else:
            assert answer.data == []
            assert sse.parse_id(answer.control["stream-reset"].id) == {"c": len(sent)}
    # Open streams continue, and trusted code reads everything.
    held = origin.open("c", last_event_id=f"c:{old}")
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 h'")
    send(database, "c", "8")
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 h'")
    assert origin.follow(held).data == ["8"]
    assert [event.data for event in get_events(["c"], "earliest").events] == [*sent, "8"]
    with override_settings(EVENTSTREAM_RETENTION=None):
        assert origin.open("c", last_event_id="earliest").data == []
        with override_settings(EVENTSTREAM_REPLAY_AGE=timedelta(days=365_000)):  # the longest
            assert origin.open("c", last_event_id="earliest").data == [*sent, "8"]


# Queries


@pytest.mark.parametrize("analyzed", [True, False])
@pytest.mark.parametrize("channels", [1, 10])
def test_replay_reads_by_index_with_any_statistics(
    database: Database, analyzed: bool, channels: int
) -> None:
    with database.connect() as admin:
        for table in ("event", "stream"):
            admin.execute(f"ALTER TABLE pg_eventstream_{table} SET (autovacuum_enabled = off)")
        admin.execute("SET session_replication_role = replica")
        admin.execute(
            "INSERT INTO pg_eventstream_event (id, channel, data)"
            " SELECT n, 'c' || n %% %s, 'data' FROM generate_series(1, 100000) AS n",
            [channels],
        )
        admin.execute(
            "INSERT INTO pg_eventstream_stream (position, channel, eid, event_id)"
            " SELECT n, 'c' || n %% %s, (n + %s - 1) / %s, n FROM generate_series(1, 100000) AS n",
            [channels, channels, channels],
        )
        if analyzed:
            admin.execute("ANALYZE pg_eventstream_event, pg_eventstream_stream")
    newest = 100_000 // channels
    for behind in (1, newest):
        with CaptureQueriesContext(connection) as captured:
            replay.replay({f"c{n}": newest - behind for n in range(channels)})
        for query in captured.captured_queries:
            with connection.cursor() as cursor:
                cursor.execute("EXPLAIN (ANALYZE, COSTS OFF) " + query["sql"])
                plan = "\n".join(row[0] for row in cursor.fetchall())
            assert "Seq Scan on pg_eventstream_event" not in plan, plan
            assert "Seq Scan on pg_eventstream_stream" not in plan, plan
            read = max(map(int, re.findall(r"rows=(\d+)", plan)))
            assert read <= channels * (replay.PAGE_EVENTS + 1), plan
