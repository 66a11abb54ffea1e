"""The events that consumers handle, and how those of older versions are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from .. import sse

#: The key in an event's ``meta`` for the version of its data. Without it, the version is 1.
VERSION = "version"

Upcast = Callable[[Any], Any]
_upcasts: dict[tuple[str, int], Upcast] = {}


@dataclass(frozen=True, slots=True)
class ConsumedEvent:
    """An event as a consumer gets it.

    ``id`` identifies it, for example as a key that another service uses to recognize repetitions.
    ``eid`` is its number in its channel, starting at 1, and ``position`` its place in the order of
    all events. ``data`` is text as it was sent. ``created`` is when its transaction began to write
    it and ``committed_at`` when that was committed (None for events of older versions).
    ``replayed`` is true if it had been handled before the consumer was reset, so that side effects
    can be left out. ``attempt`` is 1 at first.
    """

    id: str
    channel: str
    eid: int
    type: str
    data: str
    meta: Any
    position: int
    created: datetime
    committed_at: datetime | None
    replayed: bool = False
    attempt: int = 1

    @property
    def version(self) -> int:
        """The version of the data as it was sent: ``meta["version"]``, or 1."""
        version = self.meta.get(VERSION) if isinstance(self.meta, dict) else None
        return version if isinstance(version, int) and not isinstance(version, bool) else 1

    def json(self) -> Any:
        """The data parsed as JSON, and converted to its newest version: see `upcast`."""
        value = json.loads(self.data)
        version = self.version
        while (convert := _upcasts.get((self.type, version))) is not None:
            value = convert(value)
            version += 1
        return value


#: Of the channels whose events are handled now.
_quote = lru_cache(maxsize=4096)(sse.quote_channel)


def event_id(channel: str, number: int) -> str:
    """The same as `sse.make_id`."""
    return f"{_quote(channel)}:{number}"


def upcast(event_type: str, *, from_version: int) -> Callable[[Upcast], Upcast]:
    """Convert the data of old events when they are read: ``@upcast("placed", from_version=1)``.

    The function gets the data of an event of this type and version, parsed, and returns them as the
    next version would have them. `ConsumedEvent.json` calls it, and then the one for the next
    version, until there is none. The version of an event is in its ``meta``, which the sender sets:
    ``send_event(…, meta={"version": 2})``. Without it, the version is 1.

    Raises `ImproperlyConfigured` if there are two functions for the same type and version.
    """
    if not isinstance(from_version, int) or isinstance(from_version, bool):
        raise ImproperlyConfigured(
            f"upcast({event_type!r}): from_version must be a whole number, not {from_version!r}."
        )

    def declare(function: Upcast) -> Upcast:
        known = _upcasts.get((event_type, from_version))
        if known is not None and place_of(known) != place_of(function):
            raise ImproperlyConfigured(
                f"Two functions upcast {event_type!r} from version {from_version}:"
                f" {place_of(known)} and {place_of(function)}. Remove one."
            )
        _upcasts[event_type, from_version] = function
        return function

    return declare


def place_of(function: Callable[..., Any]) -> str:
    """Where a function is defined."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{function.__module__}.{name}"
