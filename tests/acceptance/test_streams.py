"""Streams through a real proxy: live, replayed, and both without a gap."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence

import pytest

from pg_eventstream import send_events, sse
from pg_eventstream.grip import items
from pg_eventstream.grip.proxy import Proxy
from pg_eventstream.servers.processes import wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.project.channelmanagers import SlowMembers
from tests.support.database import Database
from tests.support.publisher import PublisherProcess
from tests.support.rounds import prune, sequence
from tests.support.sse_client import OpenStream, Received

ODD_NAMES = [
    " blanks  around ",
    "comma,colon:slash/",
    "100%",
    "%41%s%I%%",
    '"quotes"\'',
    "ünïcode-日本-🎉",
    "semi;prev-id=0",
    "back\\slash\ttab",
    "(paren)s",
    "UPPER.lower-_~*",
]

ODD_TEXTS = [
    "",
    " ",
    "%",
    "100 %s %I %(events-x)s %%",
    "two\nlines",
    "\r\n mac \r unix \n dos \r\n\r\n",
    "\n\n\n",
    "line\u2028paragraph\u2029next\u0085form\x0cvertical\x0b",
    "🎉 ümläut 日本 \ufeff\u202e",
    "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "id: 1\nevent: forged\n\ndata: x",
    '{"json": "\\u0000 \\" \\\\"}',
    ": a comment",
]


@pytest.fixture(autouse=True)
def server_settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the application and the publisher; parametrize indirectly."""
    settings = json.dumps(getattr(request, "param", {}))
    monkeypatch.setenv("PG_EVENTSTREAM_TEST_SETTINGS", settings)


# condure 1.9 (of Pushpin 1.36) can miss that a client reads again whose buffers of 4 MB were full,
# until it checks all connections, every 45 seconds.
STALLED = 100

SELDOM = (pytest.mark.faults, pytest.mark.thorough)
on_both_servers = pytest.mark.parametrize(
    "app", ["asgi", pytest.param("wsgi", marks=SELDOM)], indirect=True
)


def send(*events: tuple[str, str]) -> None:
    send_events([(channel, "message", text, None, False) for channel, text in events])


def wait_published(database: Database) -> None:
    """Wait until the proxy has all events. Streams of several channels that are opened while events
    are published get them in the order of each channel, but not always across the channels."""
    wait_until(
        lambda: bool(
            database.value(
                "SELECT (SELECT count(*) FROM pg_eventstream_event)"
                " = (SELECT position FROM pg_eventstream_proxy)"
            )
        ),
        timeout=20,
    )


def texts(events: Sequence[Received]) -> list[str]:
    return [event.data for event in events]


def as_browsers_see_it(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


# From replay to live


@pytest.mark.parametrize(
    ("app", "server_settings"),
    [("asgi", {}), ("wsgi", {}), ("asgi", {"GRIP_PREFIX": "my-prefix:"})],
    indirect=True,
    ids=["asgi", "wsgi", "prefix"],
)
def test_resumed_streams_have_no_gap_and_no_repeat_with_any_channel_names(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    names = [f"{channel}{name}" for name in ODD_NAMES]
    texts_sent = [f"{n} {name}" for n, name in enumerate(names * 6)]
    texts_sent[50] += "x" * 500_000  # is fetched while the others are published
    events = list(zip(names * 6, texts_sent, strict=True))
    alone = [text for name, text in events if name == names[5]]

    several, single = stream(*names).wait_open(), stream(names[5]).wait_open()
    send(*events[:20])
    several.wait_count(20)
    single.wait_count(2)
    several.close()
    single.close()
    send(*events[20:40])  # while both are away
    wait_published(database)
    several_again = stream(*reversed(names), last_event_id=several.last_event_id).wait_open()
    single_again = stream(names[5], last_event_id=single.last_event_id).wait_open()
    send(*events[40:])
    several_again.wait_count(40)
    single_again.wait_count(4)

    assert texts(several.events + several_again.events) == texts_sent
    assert texts(single.events + single_again.events) == alone
    for client in (several_again, single_again):
        assert [event.type for event in client.control] == ["stream-open"]
    assert several_again.events[-1].eids == dict.fromkeys(names, 6)
    # Each single id resumes right after its event.
    for n, event in enumerate(several.events + several_again.events):
        expected = dict.fromkeys(names, 0) | {
            name: sum(1 for other, _ in events[: n + 1] if other == name) for name in names
        }
        assert {name: event.eids.get(name, 0) for name in names} == expected


def test_client_that_has_seen_nothing_yet_resumes_without_a_gap(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    first = stream(channel).wait_open()
    first.close()
    assert sse.parse_id(first.last_event_id) == {channel: 0}
    send((channel, "while away"))
    second = stream(channel, last_event_id=first.last_event_id).wait_open()
    send((channel, "live"))
    assert texts(second.wait_count(2)) == ["while away", "live"]


@on_both_servers
def test_client_that_is_3000_events_behind_gets_each_once_in_commit_order(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    names = [f"{channel}{letter}" for letter in "abc"]
    for start in range(0, 3000, 500):
        send(*((names[n * n % 7 % 3], f"{n} %") for n in range(start, start + 500)))
    wait_published(database)
    client = stream(*names, last_event_id=",".join(f"{name}:0" for name in names))
    client.wait_count(3000)
    send(*((name, "live") for name in names))
    client.wait_count(3003)
    assert texts(client.events) == [f"{n} %" for n in range(3000)] + ["live"] * 3


@on_both_servers
def test_client_that_is_megabytes_behind_gets_all_of_it(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    # On both sides of each limit: of a held response, of a page, of a live event.
    sizes = [3_000] * 100 + [45_000, 60_000, 70_000, 110_000, 500_000, 10, 5_000_000, 20]
    sent = [f"{n} %🎉".ljust(size, "%x🎉"[n % 3])[:size] for n, size in enumerate(sizes)]
    send(*((channel, text) for text in sent))
    client = stream(channel, last_event_id=f"{channel}:0")
    client.wait_count(len(sent), timeout=STALLED)
    send((channel, "live"))
    assert texts(client.wait_count(len(sent) + 1)) == [*sent, "live"]
    assert client.connections == 1
    # The first response can begin with a large one, too.
    for start in (103, 104):
        rest = stream(channel, last_event_id=f"{channel}:{start}")
        assert texts(rest.wait_count(len(sent) + 1 - start, STALLED)) == [*sent[start:], "live"]


@pytest.mark.parametrize(
    "server_settings",
    [{"EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channelmanagers.SlowMembers"}],
    indirect=True,
)
@pytest.mark.parametrize("pages", [1, 2])
def test_event_between_the_last_page_and_the_hold_is_not_missed(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str, pages: int
) -> None:
    """No later event reveals the gap, and the proxy would ask only after ten minutes."""
    channel = f"public{channel}"
    with database.connect() as listener:
        listener.execute(f"LISTEN {SlowMembers.DECIDED}")
        witness = stream(channel).wait_open()
        # When it was opened, and a second later, as the proxy does once per channel.
        assert len(list(listener.notifies(timeout=20, stop_after=2))) == 2
    send(*((channel, str(n) * 40_000) for n in range(2)))
    witness.wait_count(2)
    wait_published(database)
    decided = """SELECT EXISTS (SELECT FROM pg_stat_activity
                  WHERE datname = current_database() AND wait_event = 'advisory')"""
    with database.connect() as gate:
        gate.execute("SELECT pg_advisory_lock(%s)", [SlowMembers.GATE])
        client = stream(channel, last_event_id=f"{channel}:{2 - pages}")
        for page in range(pages):
            wait_until(lambda: database.value(decided), timeout=10)
            if page < pages - 1:
                gate.execute("SELECT pg_advisory_unlock(%s)", [SlowMembers.GATE])
                gate.execute("SELECT pg_advisory_lock(%s)", [SlowMembers.GATE])
                client.wait_count(1)
        send((channel, "late"))
        witness.wait_count(3)
    assert texts(client.wait_count(pages + 1, timeout=10))[-1] == "late"


@pytest.mark.faults
@pytest.mark.thorough
def test_100_clients_that_reconnect_at_once_are_up_to_date_within_seconds(
    database: Database,
    publisher: PublisherProcess,
    pushpin: Pushpin,
    stream: OpenStream,
    channel: str,
) -> None:
    sent = [f"{n} {'x' * 100}" for n in range(1200)]  # three pages
    send(*((channel, text) for text in sent))
    began = time.monotonic()
    clients = [stream(channel, last_event_id=f"{channel}:0") for _ in range(100)]
    for client in clients:
        client.wait_count(len(sent))
    assert time.monotonic() - began < 20  # by separate links, it would be 30

    # They share their next link; separate links are fetched at most 10 per second.
    publisher.kill()
    send((channel, "never published"))
    sequence(database)
    began = time.monotonic()
    proxy = Proxy({"control_uri": pushpin.control_url})
    proxy.post(items.Batch([], [items.hint(channel)]).body)
    for client in clients:
        assert texts(client.wait_count(len(sent) + 1)) == [*sent, "never published"]
    assert time.monotonic() - began < 9  # by separate links, it would be 10


def test_reset_stream_continues_with_live_events(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    send((channel, "1"), (channel, "2"))
    stream(channel, last_event_id=f"{channel}:0").wait_count(2)
    prune()
    client = stream(channel, last_event_id=f"{channel}:1").wait_open()
    client.wait_for(lambda: len(client.control) == 2)
    reset = client.control[1]
    assert (reset.type, json.loads(reset.data)) == ("stream-reset", {"channels": [channel]})
    assert reset.eids == {channel: 2}
    send((channel, "3"))
    assert texts(client.wait_count(1)) == ["3"]
    assert client.events[0].eids == {channel: 3}


# Contents


def test_texts_arrive_unchanged_and_live_the_same_as_replayed(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    live = stream(channel).wait_open()
    types = ["message", "100 %I", "t: y", " ü🎉\t"]
    sent = list(itertools.product(types, ODD_TEXTS))
    send_events([(channel, event_type, text, None, False) for event_type, text in sent])
    live.wait_count(len(sent))
    held = stream(channel, last_event_id=f"{channel}:0")
    held.wait_count(len(sent))
    # Again as a page, which the proxy's filters do not apply to.
    send((channel, "x" * 60_000))
    paged = stream(channel, last_event_id=f"{channel}:0")
    paged.wait_count(len(sent) + 1)
    expected = [(event_type, as_browsers_see_it(text)) for event_type, text in sent]
    for client in (live, held, paged):
        got = [(event.type, event.data) for event in client.events]
        assert got[: len(sent)] == expected
        assert [event.eids for event in client.events[: len(sent)]] == [
            {channel: n} for n in range(1, len(sent) + 1)
        ]


def test_event_too_large_for_the_proxy_reaches_connected_clients_in_order(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client, both = stream(channel).wait_open(), stream(channel, f"{channel}quiet").wait_open()
    sent = ["first"]
    # Above the limit unchanged, when escaped, as JSON, and as lines of a stream.
    for large in ("%" * 500_000, "%" * 399_000, "\x01" * 200_000, "\n" * 200_000):
        sent += [large, f"after {len(sent)}"]
    for text in sent:
        send((channel, text))
    send(*((channel, text) for text in sent))  # and again, all at once
    for reader in (client, both):
        assert texts(reader.wait_count(2 * len(sent))) == [*sent, *sent]
        assert reader.connections == 1


def test_event_of_5_megabytes_reaches_a_connected_client_in_order(
    publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    sent = ["before", "m" * 5_000_000, "after"]
    send(*((channel, text) for text in sent))
    assert texts(client.wait_count(3, timeout=STALLED)) == sent
