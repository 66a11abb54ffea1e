"""Lines of the tail: nothing in an event acts upon the terminal, and no line is too wide."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from django.utils.timezone import localtime

from pg_eventstream.errors import InvalidRequest
from pg_eventstream.operate.events.lines import as_json, as_text, escape, shorten
from pg_eventstream.operate.events.tail import TailedEvent, parse_since

NOW = datetime.now(timezone.utc)
HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31m\u202eevil\u2028\x00\x7f\ud800"


def tailed(**changes: Any) -> TailedEvent:
    fields: dict[str, Any] = {
        "position": 9,
        "id": "room:5",
        "channel": "room",
        "type": "paid",
        "data": '{"order": 7}',
        "skip_user_ids": [],
        "meta": None,
        "created": NOW - timedelta(seconds=2),
        "committed": NOW,
        "sequenced": NOW + timedelta(milliseconds=2),
    }
    return TailedEvent(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "room:5  paid  +2ms"),
        ({"committed": None}, "room:5  paid  created +2.0s"),
        ({"sequenced": NOW - timedelta(seconds=1)}, "room:5  paid  +0ms"),
        ({"published": False}, "room:5  paid  +2ms  not published yet"),
        ({"published": True}, "room:5  paid  +2ms  published"),
        (
            {"published": True, "published_within": timedelta(milliseconds=480)},
            "room:5  paid  +2ms  <=480ms",
        ),
        ({"id": None, "channel": "a b"}, "a%20b  paid  +2ms"),
        ({"type": "a\nb"}, "room:5  a\\nb  +2ms"),
    ],
)
def test_line_for_a_person(changes: dict[str, Any], line: str) -> None:
    event = tailed(**changes)
    assert as_text(event, None).endswith(f'  {line}  {{"order": 7}}')
    clock = f"{localtime(event.begun):%H:%M:%S}"
    assert clock in as_text(event, None)


def test_line_of_another_day_has_its_date() -> None:
    begun = NOW - timedelta(days=40)
    assert as_text(tailed(committed=begun), None).startswith(f"{localtime(begun):%Y-%m-%d %H:}")


def test_no_control_character_reaches_the_terminal() -> None:
    event = tailed(type=HOSTILE, data=HOSTILE, channel=HOSTILE.replace("\ud800", ""), id=None)
    for line in (as_text(event, None), as_text(event, 80), as_json(tailed(data=HOSTILE))):
        assert line.isprintable()
    assert escape("\x1b[31m\n") == "\\x1b[31m\\n"
    assert escape("größer 語 \\n") == "größer 語 \\n"


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abc..."),
        ("語語語", 6, "語語語"),
        ("語語語語", 6, "語..."),
        ("e\u0301" * 6, 6, "e\u0301" * 6),
        ("abcdef", 2, ".."),
        ("", 0, ""),
    ],
)
def test_text_is_shortened_to_columns(text: str, width: int, shown: str) -> None:
    assert shorten(text, width) == shown


def test_keys_of_the_json() -> None:
    assert json.loads(as_json(tailed(published=True, meta={"a": 1}))) == {
        "position": 9,
        "id": "room:5",
        "channel": "room",
        "type": "paid",
        "data": '{"order": 7}',
        "skip_user_ids": [],
        "meta": {"a": 1},
        "created": (NOW - timedelta(seconds=2)).isoformat(),
        "committed": NOW.isoformat(),
        "sequenced": (NOW + timedelta(milliseconds=2)).isoformat(),
        "delay_since": "committed",
        "sequenced_after": 0.002,
        "published": True,
        "published_within": None,
    }


@pytest.mark.parametrize(
    ("text", "since"),
    [
        (None, None),
        ("earliest", "earliest"),
        ("30s", timedelta(seconds=30)),
        ("10m", timedelta(minutes=10)),
        ("2h", timedelta(hours=2)),
        ("1d", timedelta(days=1)),
        ("room:5", {"room": 5}),
        ("a%20b:5,c:0", {"a b": 5, "c": 0}),
    ],
)
def test_places_to_begin(text: str | None, since: object) -> None:
    assert parse_since(text, []) == since


@pytest.mark.parametrize("text", ["", "room", "10", "10x", "-5m", "5 m", "room:", "room:x", "5"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is neither an age"):
        parse_since(text, [])
