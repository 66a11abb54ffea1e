"""The wire format: events, ids and errors as Server-Sent Events.

It is compatible with django-eventstream's, so that its clients understand it. The standard:
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
#: With the encoding that event streams always have: a client that follows HTTP would otherwise
#: decode it as Latin-1, and Django would encode it in DEFAULT_CHARSET.
CONTENT_TYPE = f"{MEDIA_TYPE}; charset=utf-8"
KEEP_ALIVE = "event: keep-alive\ndata:\n\n"
KEEP_ALIVE_SECONDS = 20

#: The number in an event's id is its eid, or, after the first incarnation of the stream
#: (`models.Cursor`), its eid plus a multiple of this. It has at most 18 digits.
INCARNATION = 10**12

# Fills the buffers of old browsers and of proxies, so that the first event is shown at once.
PADDING = ":" + " " * 2048 + "\n\n"

#: Types of the server's own events about the stream, which senders may not use. Clients compare
#: types exactly.
RESERVED_TYPES = ("stream-open", "stream-reset", "stream-error", "keep-alive", "event-erased")

_ERROR_ID = "error"
# Only these three end a line of an event stream; str.splitlines() splits at many more.
_LINE_END = re.compile(r"\r\n|\r|\n")
_UNSAFE = re.compile(r"[\r\n\0]")


def encode_event(event_type: str, data: str, event_id: str | None = None) -> str:
    """Encode an event. Each line of the data becomes a ``data:`` line."""
    text = f"event: {remove_line_breaks(event_type)}\n"
    if event_id is not None:
        text += f"id: {remove_line_breaks(event_id)}\n"
    if "\n" in data or "\r" in data:
        data = "\ndata: ".join(_LINE_END.split(data))
    return f"{text}data: {data}\n\n"


def remove_line_breaks(text: str) -> str:
    """Without CR, LF and NUL, which no name in an event stream can contain."""
    return text if text.isprintable() else _UNSAFE.sub("", text)


def encode_comment(text: str) -> str:
    """Encode a comment, which clients ignore. No line of the text can become anything else."""
    lines = _LINE_END.split(text.replace("\0", ""))
    return "".join(f": {line}\n" for line in lines) + "\n"


def encode_open(event_id: str | None) -> str:
    """Encode the first event, from whose id a client can resume that has received nothing else."""
    return PADDING + encode_event("stream-open", "", event_id)


def encode_reset(channels: Iterable[str], event_id: str) -> str:
    """Encode a reset: events are gone. The client reloads its state and continues from the id."""
    return encode_event("stream-reset", json.dumps({"channels": sorted(channels)}), event_id)


def encode_error(condition: str, text: str, extra: Mapping[str, Any] | None = None) -> str:
    """Encode an error that ends a stream permanently: a client cannot resume from its id."""
    data = {"condition": condition, "text": text, **(extra or {})}
    return encode_event("stream-error", json.dumps(data, cls=DjangoJSONEncoder), _ERROR_ID)


def quote_channel(channel: str) -> str:
    """The name of a channel inside an id or a header, without ``,``, ``:`` and spaces.

    A result of more than 64 characters is replaced by the digest of the name, so that an id with
    the maximum number of channels fits into a request.
    """
    return quote_name(channel, 64)


def quote_name(name: str, most: int) -> str:
    """The percent-encoded name, or its digest if that has more than ``most`` characters.

    It is not feasible to find a name with the digest of another one. No quoted name looks like a
    digest, because quote() does not encode ``~``.
    """
    quoted = quote(name)
    if len(quoted) <= most:
        return quoted
    return "%7E" + blake2b(name.encode(), digest_size=16).hexdigest()


def make_id(numbers: Mapping[str, int]) -> str:
    """The composite id of several channels: ``room:5,news:7``."""
    return ",".join(f"{quote_channel(channel)}:{number}" for channel, number in numbers.items())


class Place:
    """A place in several channels. It moves with each event.

    ``numbers`` holds the number in the id of each channel. ``id`` is the same as `make_id` of them,
    from parts that are encoded only once.
    """

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self.numbers = dict(numbers)
        self._names = {channel: quote_channel(channel) for channel in numbers}
        self._parts = {name: f"{self._names[name]}:{number}" for name, number in numbers.items()}
        self.id = ",".join(self._parts.values())

    def move(self, channel: str, number: int) -> None:
        """Move to an event of the channel with this number."""
        self.numbers[channel] = number
        self._parts[channel] = part = f"{self._names[channel]}:{number}"
        # Most streams have one channel, and this runs for each event of each stream.
        self.id = part if len(self._parts) == 1 else ",".join(self._parts.values())


def parse_id(event_id: str, channels: Iterable[str] = ()) -> dict[str, int]:
    """The number of each channel in a composite id: see `INCARNATION`.

    A digest in the id stands for one of ``channels``.

    The first value of a channel counts: behind a proxy, the event's own id comes first, followed by
    the ids that the proxy knows, which can be the previous ones (`grip.instruct.id_format`).

    Raises `ResumeNotAllowed` for the id of a ``stream-error``, and `InvalidRequest` for an id that
    no server sent.
    """
    if event_id.strip() == _ERROR_ID:
        raise ResumeNotAllowed("Can't resume session after stream-error")
    asked = {quote_channel(channel): channel for channel in channels}
    numbers: dict[str, int] = {}
    for part in event_id.strip().split(","):
        name, colon, number = part.strip().rpartition(":")
        # At most 18 digits, which always fit into a bigint.
        if not colon or not name or not re.fullmatch(r"[0-9]{1,18}", number):
            raise InvalidRequest("Last-Event-ID is malformed; send the unchanged id of an event")
        numbers.setdefault(asked.get(name) or unquote(name), int(number))
    return numbers
