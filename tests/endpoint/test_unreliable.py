"""Unreliable channels: no ids, no replay, pruned soon; and still transactional."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from io import StringIO

import pytest
from django.core.management import call_command
from django.test import override_settings

from pg_eventstream import get_current_event_id, get_events, permission, send_event
from pg_eventstream.publisher.pruner import Pruner
from tests.project.channelmanagers import Volatile
from tests.support.database import Database
from tests.support.environment import settings_everywhere
from tests.support.origin import Origin, behind_a_proxy
from tests.support.rounds import sequence
from tests.support.sse_client import SSEClient


@pytest.fixture(autouse=True)
def volatile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make channels whose names begin with "volatile" unreliable, here and in the servers."""
    manager = "tests.project.channelmanagers.Volatile"
    with settings_everywhere(monkeypatch, EVENTSTREAM_CHANNELMANAGER_CLASS=manager):
        yield


def send(channel: str, *texts: str, skip: int | None = None) -> None:
    for text in texts:
        send_event(channel, "message", text, [skip] if skip else None, json_encode=False)


def texts(client: SSEClient) -> list[str]:
    return [event.data for event in client.events]


@behind_a_proxy
def test_unreliable_events_are_not_replayed(database: Database) -> None:
    for name in ("volatile", "reliable"):
        send(name, "1", "2")
    sequence(database)
    origin = Origin()
    for start in ("earliest", "volatile:0,reliable:0"):
        answer = origin.open("volatile", "reliable", last_event_id=start)
        assert [event.eids for event in answer.events] == [{"reliable": 1}, {"reliable": 2}]
        assert answer.held
        assert origin.follow(answer).held
    answer = origin.open("volatile", last_event_id="volatile:1")
    assert answer.held
    assert answer.events == []
    assert answer.control["stream-open"].id == ""
    assert origin.follow(answer).held
    assert get_current_event_id(["volatile", "reliable"]) == "reliable:2"
    assert len(get_events(["volatile", "reliable"], "earliest").events) == 2


# Pruned soon


def kept(database: Database) -> list[str]:
    return [row[0] for row in database.fetch("SELECT data FROM pg_eventstream_event ORDER BY id")]


@pytest.mark.parametrize("taken", [0, 4])
def test_unreliable_events_are_pruned_after_a_minute_even_if_not_taken(
    database: Database, channel: str, taken: int
) -> None:
    # Not sooner: a process that streams directly can be behind a proxy.
    send(f"volatile{channel}", "1", "2", "3")
    send(channel, "stays")
    sequence(database)
    database.execute("INSERT INTO pg_eventstream_proxy VALUES ('near', %s)", [taken])

    def make_older(seconds: int, condition: str) -> None:
        database.execute(
            "UPDATE pg_eventstream_stream"
            f" SET sequenced_at = now() - interval '{seconds} seconds' WHERE {condition}"
        )

    with behind_a_proxy:
        make_older(57, "true")
        call_command_quietly("eventstream_prune")
        assert kept(database) == ["1", "2", "3", "stays"]
        make_older(61, "position <= 2")
        call_command_quietly("eventstream_prune")
        assert kept(database) == ["3", "stays"]
        make_older(61, "true")
        call_command_quietly("eventstream_prune")
    assert kept(database) == ["stays"]
    assert database.value("SELECT count(*) FROM pg_eventstream_stream") == 1


def call_command_quietly(name: str) -> None:
    call_command(name, stdout=StringIO())


def test_channel_that_becomes_reliable_does_not_use_an_id_again(
    database: Database, channel: str
) -> None:
    name = f"volatile{channel}"
    send(name, "1", "2")
    sequence(database)
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 hour'")
    call_command_quietly("eventstream_prune")
    with override_settings(
        EVENTSTREAM_CHANNELMANAGER_CLASS="pg_eventstream.channelmanager.DefaultChannelManager"
    ):
        send(name, "3")
        sequence(database)
        assert get_current_event_id([name]) == f"{name}:3"


def test_manager_that_fails_stops_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Volatile, channel: str) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(Volatile, "is_channel_reliable", fail)
    send("volatile", "kept")
    sequence(database)
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 hour'")
    call_command_quietly("eventstream_prune")
    assert kept(database) == ["kept"]
    assert "is_channel_reliable('volatile') failed" in caplog.text


@pytest.mark.parametrize("proxied", [False, True])
def test_change_of_permission_is_kept_like_a_reliable_event(
    database: Database, channel: str, proxied: bool
) -> None:
    # A proxy or a process that is late still ends the streams that may not continue.
    permission.channel_permission_changed(None, channel)
    sequence(database)
    database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '23 hours'")
    database.execute("INSERT INTO pg_eventstream_proxy VALUES ('near', 1)")
    with behind_a_proxy if proxied else nullcontext():
        call_command_quietly("eventstream_prune")
        assert len(kept(database)) == 1
        database.execute("UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '25 h'")
        call_command_quietly("eventstream_prune")
    assert kept(database) == []


def test_no_id_is_used_again_when_a_channel_was_taken_for_reliable_for_a_while(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Volatile, channel: str) -> bool:
        raise ZeroDivisionError

    with database.connect() as connection:
        sweep = Pruner(connection)

        def send_and_sweep() -> list[int]:
            send("volatile", "x", "y")
            sequence(database)
            eids = database.fetch("SELECT eid FROM pg_eventstream_stream ORDER BY position")
            database.execute(
                "UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 hour'"
            )
            sweep.run_once()
            return [eid for (eid,) in eids][-2:]

        with monkeypatch.context() as failing:
            failing.setattr(Volatile, "is_channel_reliable", fail)
            assert send_and_sweep() == [1, 2]
        assert [send_and_sweep() for _ in range(3)] == [[3, 4], [5, 6], [7, 8]]


def test_pruner_that_continues_skips_no_event(database: Database) -> None:
    with database.connect() as connection:
        sweep = Pruner(connection)
        for _ in range(3):
            send("volatile", "x")
            sequence(database)
            database.execute(
                "UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '61 seconds'"
            )
            assert sweep.run_once() == 1
