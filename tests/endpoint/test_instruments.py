"""The application's counters: recoveries by outcome, resets, revocations, open streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, cast

import pytest
from django.db import connections
from django.test import override_settings

from pg_eventstream import channel_permission_changed, send_events
from pg_eventstream.errors import EventPermissionError
from pg_eventstream.streams import direct
from pg_eventstream.streams.replay import parse_start
from pg_eventstream.users import user_id
from tests.project.channelmanagers import Racing
from tests.support.database import Database
from tests.support.instrument_values import Increases, value
from tests.support.origin import Origin, behind_a_proxy
from tests.support.rounds import prune, sequence


def send(database: Database, channel: str, count: int) -> None:
    send_events([(channel, "message", n) for n in range(count)])
    sequence(database)


def counted(action: Callable[[], object]) -> dict[str, float]:
    before = Increases()
    action()
    return before.all()


RECOVERIES = {
    "": {},
    "earliest": {},
    "{c}:1": {"recoveries_total/resumed": 1},
    "{c}:3": {"recoveries_total/nothing_missed": 1},
    "{c}:77": {"recoveries_total/reset": 1, "resets_total": 1},
    "another:1": {"recoveries_total/nothing_missed": 1},
    "nonsense": {"recoveries_total/refused": 1},
}


@behind_a_proxy
@pytest.mark.parametrize("last_event_id", RECOVERIES)
def test_stream_behind_a_proxy_counts_what_became_of_the_id(
    database: Database, channel: str, last_event_id: str
) -> None:
    send(database, channel, 3)
    given = last_event_id.format(c=channel)
    found = counted(lambda: Origin().open(channel, last_event_id=given))
    assert found == RECOVERIES[last_event_id]


@behind_a_proxy
def test_pruned_events_are_a_reset_and_error_ends_the_resuming(
    database: Database, channel: str
) -> None:
    send(database, channel, 3)
    prune()
    origin = Origin()
    reset = {"recoveries_total/reset": 1, "resets_total": 1}
    assert counted(lambda: origin.open(channel, last_event_id=f"{channel}:1")) == reset
    refused = {"recoveries_total/refused": 1}
    assert counted(lambda: origin.open(channel, last_event_id="error")) == refused


@behind_a_proxy
@override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Racing")
def test_refused_reader_and_revoked_stream(
    database: Database, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Racing, "allowed", True)
    origin = Origin()
    opened = origin.open(channel)
    monkeypatch.setattr(Racing, "allowed", False)
    assert counted(lambda: origin.follow(opened)) == {"revocations_total": 1}
    assert counted(lambda: origin.open(channel)) == {}
    refused = {"recoveries_total/refused": 1}
    assert counted(lambda: origin.open(channel, last_event_id=f"{channel}:1")) == refused
    assert counted(lambda: origin.open(channel, last_event_id="earliest")) == {}


@behind_a_proxy
def test_next_link_counts_a_reset_but_no_recovery(database: Database, channel: str) -> None:
    """The proxy asks for it, however often."""
    send(database, channel, 2)
    origin = Origin()
    opened = origin.open(channel, last_event_id=f"{channel}:1")
    send(database, channel, 2)
    assert counted(lambda: origin.follow(opened)) == {}
    database.execute("DELETE FROM pg_eventstream_stream WHERE eid = 3")
    assert counted(lambda: origin.follow(opened)) == {"resets_total": 1}


# Without a proxy


def stream(
    channel: str,
    after: Mapping[str, int],
    work: Callable[[AsyncIterator[bytes]], Any],
    check: Callable[[], None] = lambda: None,
) -> None:
    async def run() -> None:
        response = direct.stream((channel,), after, user_id(None), check, {})
        pieces = cast("AsyncIterator[bytes]", response.streaming_content)
        await asyncio.wait_for(work(pieces), 20)
        await pieces.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())


# One that is refused is so before it streams.
@pytest.mark.parametrize(
    "last_event_id",
    [given for given, counts in RECOVERIES.items() if "refused" not in str(counts)],
)
def test_stream_without_a_proxy_counts_the_same(
    database: Database, channel: str, last_event_id: str
) -> None:
    send(database, channel, 3)
    after = parse_start(last_event_id.format(c=channel), [channel])

    async def work(pieces: AsyncIterator[bytes]) -> None:
        await anext(pieces)
        assert value("streams_open") == 1

    found = counted(lambda: stream(channel, after, work))
    assert found.pop("hub_pages_total", 0) == 0
    assert found == RECOVERIES[last_event_id]
    assert value("streams_open") == 0


def test_stream_without_a_proxy_counts_pages_and_a_revocation(
    database: Database, channel: str
) -> None:
    allowed = True

    def check() -> None:
        if not allowed:
            raise EventPermissionError([channel])

    def revoke() -> None:
        channel_permission_changed(None, channel)
        connections.close_all()  # those of this thread

    async def work(pieces: AsyncIterator[bytes]) -> None:
        nonlocal allowed
        await anext(pieces)
        allowed = False
        await asyncio.to_thread(revoke)
        assert b"stream-error" in [piece async for piece in pieces][-1]

    found = counted(lambda: stream(channel, {}, work, check))
    # The hub sequences the change, as no publisher runs.
    assert found == {"sequenced_events_total": 1, "hub_pages_total": 1, "revocations_total": 1}
