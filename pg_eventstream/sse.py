"""The wire format: events, ids and errors as Server-Sent Events.

As django-eventstream writes it, so that its clients understand it. The format itself:
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any
from urllib.parse import quote, unquote

from django.core.serializers.json import DjangoJSONEncoder

from .errors import InvalidRequest, ResumeNotAllowed

MEDIA_TYPE = "text/event-stream"
#: With what an event stream always is: a client that follows HTTP more than the format would take
#: any other text for Latin-1, and Django would encode it in DEFAULT_CHARSET.
CONTENT_TYPE = f"{MEDIA_TYPE}; charset=utf-8"
KEEP_ALIVE = "event: keep-alive\ndata:\n\n"
KEEP_ALIVE_SECONDS = 20

#: What an id shows of an event is its eid, and from the second incarnation of the stream on
#: (`models.Cursor`) its eid plus a multiple of this. 18 digits at most.
INCARNATION = 10**12

# Fills the buffers of old browsers and of proxies, so that the first event shows at once.
PADDING = ":" + " " * 2048 + "\n\n"

#: Types of events by which the server speaks of the stream itself. Nobody else may send them. They
#: are what a client compares them with: exactly these texts.
RESERVED_TYPES = ("stream-open", "stream-reset", "stream-error", "keep-alive", "event-erased")

_ERROR_ID = "error"
# Only these three end a line of an event stream; str.splitlines() knows many more.
_LINE_END = re.compile(r"\r\n|\r|\n")
_UNSAFE = re.compile(r"[\r\n\0]")


def encode_event(event_type: str, data: str, event_id: str | None = None) -> str:
    """One event. Data of several lines becomes one ``data:`` line each."""
    text = f"event: {_safe(event_type)}\n"
    if event_id is not None:
        text += f"id: {_safe(event_id)}\n"
    if "\n" in data or "\r" in data:
        data = "\ndata: ".join(_LINE_END.split(data))
    return f"{text}data: {data}\n\n"


def _safe(text: str) -> str:
    return text if text.isprintable() else _UNSAFE.sub("", text)


def encode_open(event_id: str | None) -> str:
    """The first event: a client that has seen nothing yet can resume from its id."""
    return PADDING + encode_event("stream-open", "", event_id)


def encode_reset(channels: Iterable[str], event_id: str) -> str:
    """What the client asks for is gone: it reloads its state and goes on from this id."""
    return encode_event("stream-reset", json.dumps({"channels": sorted(channels)}), event_id)


def encode_error(condition: str, text: str, extra: Mapping[str, Any] | None = None) -> str:
    """Ends a stream for good: its id cannot be resumed from."""
    data = {"condition": condition, "text": text, **(extra or {})}
    return encode_event("stream-error", json.dumps(data, cls=DjangoJSONEncoder), _ERROR_ID)


def quote_channel(channel: str) -> str:
    """The name of a channel inside an id or a header: neither ``,`` ``:`` nor spaces.

    Never longer than 64 characters, so that the id of as many channels as there can be fits
    into a request: a longer name is replaced by its digest.
    """
    return quote_name(channel, 64)


def quote_name(name: str, most: int) -> str:
    """The name, percent-encoded; if that is longer than so many characters, a digest of it.

    Nobody can find a name with the digest of another. No name that is quoted looks like one,
    since quote() leaves ``~`` as it is.
    """
    quoted = quote(name)
    if len(quoted) <= most:
        return quoted
    return "%7E" + blake2b(name.encode(), digest_size=16).hexdigest()


def make_id(numbers: Mapping[str, int]) -> str:
    """The composite id of several channels: ``room:5,news:7``."""
    return ",".join(f"{quote_channel(channel)}:{number}" for channel, number in numbers.items())


class Place:
    """A place in several channels, and the id that stands for it. It moves with each event."""

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self.numbers = dict(numbers)
        self._names = {channel: quote_channel(channel) for channel in numbers}
        self._parts = {name: f"{self._names[name]}:{number}" for name, number in numbers.items()}

    def move(self, channel: str, number: int) -> None:
        """After an event of the channel whose id shows this number."""
        self.numbers[channel] = number
        self._parts[channel] = f"{self._names[channel]}:{number}"

    @property
    def id(self) -> str:
        """As `make_id` makes it, from parts that are made once."""
        return ",".join(self._parts.values())


def parse_id(event_id: str, channels: Iterable[str] = ()) -> dict[str, int]:
    """The number of each channel in a composite id: see `INCARNATION`.

    What is a digest there names one of ``channels``.

    The first value of a channel wins: behind a proxy the event's own id comes first and
    is followed by what the proxy knows, which may be the previous one (`grip.instruct.id_format`).

    Raises `ResumeNotAllowed` for the id of a ``stream-error``, `InvalidRequest` for
    anything that no server sent.
    """
    if event_id.strip() == _ERROR_ID:
        raise ResumeNotAllowed("Can't resume session after stream-error")
    asked = {quote_channel(channel): channel for channel in channels}
    numbers: dict[str, int] = {}
    for part in event_id.strip().split(","):
        name, colon, number = part.strip().rpartition(":")
        # At most 18 digits: what fits into a bigint, with no look at its exact limit.
        if not colon or not name or not re.fullmatch(r"[0-9]{1,18}", number):
            raise InvalidRequest(
                "Last-Event-ID is malformed; send back the id of an event as it arrived"
            )
        numbers.setdefault(asked.get(name) or unquote(name), int(number))
    return numbers
