"""A stream that opens also resumes and continues, or is refused, with names of any length."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from pg_eventstream import get_current_event_id, get_events, send_event, sse
from pg_eventstream.grip import links
from tests.support.database import Database
from tests.support.environment import settings_everywhere
from tests.support.long_names import SETTINGS, SHAPES, names
from tests.support.origin import Answer, Origin, behind_a_proxy
from tests.support.rounds import sequence


@pytest.fixture(autouse=True)
def settings_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with settings_everywhere(monkeypatch, **SETTINGS):
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_with_names_in_full_are_resumed_from_as_ever(database: Database, shape: str) -> None:
    channels = names(shape, "run", 3)
    for text in ("1", "2"):
        for channel in channels:
            send_event(channel, "message", text)
    sequence(database)
    in_full = ",".join(f"{quote(channel)}:1" for channel in channels)
    now = get_current_event_id(channels)
    page = get_events(channels, in_full)
    assert ([e.json() for e in page.events], page.reset) == (["2"] * 3, [])
    assert page.last_event_id == now
    assert get_events(channels, page.events[0].id).events == page.events[1:]


@behind_a_proxy
def test_streams_that_were_held_by_full_names_continue(database: Database) -> None:
    channels = names("letters", "run", 3)
    link = f"/events/{links.NEXT}{links.sign(links.Session(tuple(channels), 'anonymous'))}"
    last = ", ".join(f"events-{quote(channel)}; last-id=0" for channel in channels)
    answer = Origin().ask(link, {"Grip-Last": last})
    assert answer.held
    assert Origin().follow(answer).held


# Refusals


def refusal(answer: Answer) -> str:
    [error] = answer.all
    data = json.loads(error.data)
    assert (error.id, data["condition"]) == ("error", "bad-request")
    return str(data["text"])


@behind_a_proxy
def test_link_that_is_too_long_for_a_request_line_is_refused_at_opening(
    database: Database,
) -> None:
    origin, held = Origin(), []
    for length in range(20, 255, 5):
        answer = origin.ask("/events/", {"X-Names": f"letters,run,{length}"})
        held.append(answer.held)
        if answer.held:
            # Also with the ids of all channels at their maximum length.
            channels = tuple(sorted(names("letters", "run", length=length)))
            ids = {c: random.Random(c).randrange(10**17, 10**18) for c in channels}
            token = links.sign(links.Session(channels, "anonymous", ids))
            assert len(f"GET /events/{links.NEXT}{token} HTTP/1.1\r\n") <= 4094
            head = sum(len(f"{name}: {value}\r\n") for name, value in answer.response.items())
            assert head < 8192
        else:
            assert "too long together" in refusal(answer)
    assert held == sorted(held, reverse=True)
    assert held[0]
    assert not held[-1]


@behind_a_proxy
def test_request_without_room_for_an_id_is_refused_at_opening_and_never_later(
    database: Database,
) -> None:
    origin = Origin()
    channels = [f"c{n}" for n in range(19)]

    def ask(filler: int, **query: list[str]) -> Answer:
        address = "/events/?" + "&".join(f"channel={channel}" for channel in channels)
        given = "".join(f"&lastEventId={quote(value)}" for value in query.get("last", []))
        return origin.ask(address + given, {"Cookie": "x" * filler, **headers})

    headers: dict[str, str] = {}
    most = next(size for size in range(8192, 0, -1) if ask(size).held)
    assert 6000 < most < 8000
    assert "too long to be resumed" in refusal(ask(most + 1))
    last = sse.make_id(dict.fromkeys(channels, 10**18 - 1))
    assert ask(most, last=[last]).held
    headers = {"Last-Event-ID": f"c9:{10**18 - 1},{last}"}
    resumed = ask(most)
    assert resumed.held
