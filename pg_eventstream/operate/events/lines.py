"""Events of the tail as lines: text for a person, or JSON."""

from __future__ import annotations

import json
import unicodedata
from datetime import datetime, timedelta

from django.utils import timezone

from ... import sse
from .tail import TailedEvent

#: Ends a text that is shortened.
_CUT = "..."


def escape(text: str) -> str:
    """The text without characters that a terminal would act upon, or that would end the line.

    Control characters, line breaks, and characters that change the direction of writing become
    escape sequences as in Python.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shorten(text: str, width: int) -> str:
    """The beginning of the text that is at most ``width`` columns wide in a terminal."""
    used = kept = 0
    for index, character in enumerate(text, start=1):
        used += _columns(character)
        if used <= width - len(_CUT):
            kept = index
        if used > width:
            return (text[:kept] + _CUT)[:width]
    return text


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def as_text(event: TailedEvent, width: int | None) -> str:
    """One line, at most ``width`` columns wide (None: without limit)."""
    since = "" if event.committed else "created "
    parts = [
        _clock(event.begun),
        event.id or sse.quote_channel(event.channel),
        escape(event.type),
        f"{since}+{_duration(event.sequenced_after)}",
    ]
    if event.published is not None:
        parts.append(_published(event))
    line = "  ".join([*parts, escape(event.data)])
    return line if width is None else shorten(line, width)


def _clock(moment: datetime) -> str:
    moment = timezone.localtime(moment)
    clock = f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03}"
    is_today = moment.date() == timezone.localtime(timezone.now()).date()
    return clock if is_today else f"{moment:%Y-%m-%d} {clock}"


def _published(event: TailedEvent) -> str:
    if not event.published:
        return "not published yet"
    within = event.published_within
    return "published" if within is None else f"<={_duration(within)}"


def _duration(length: timedelta) -> str:
    seconds = length.total_seconds()
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    return f"{seconds:.1f}s" if seconds < 100 else f"{seconds:.0f}s"


def as_json(event: TailedEvent) -> str:
    """One JSON object, in ASCII. Times are in UTC, and delays in seconds."""
    within = event.published_within
    return json.dumps(
        {
            "position": event.position,
            "id": event.id,
            "channel": event.channel,
            "type": event.type,
            "data": event.data,
            "skip_user_ids": event.skip_user_ids,
            "meta": event.meta,
            "created": event.created.isoformat(),
            "committed": None if event.committed is None else event.committed.isoformat(),
            "sequenced": event.sequenced.isoformat(),
            "delay_since": "committed" if event.committed else "created",
            "sequenced_after": event.sequenced_after.total_seconds(),
            "published": event.published,
            "published_within": None if within is None else within.total_seconds(),
        }
    )
