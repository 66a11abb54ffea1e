"""The events of a consumer that wait for a person: parked ones, and those at which it fails.

All functions take a psycopg connection.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol, TypeVar

from .. import sse
from ..errors import EventStreamError, UnknownConsumer
from ..postgres.locks import CONSUMER_LOCKS, MEMBER, owner_of
from .checkpoints import Connection
from .declare import discover
from .event import event_id


class Named(Protocol):
    """An event that a person can name by its id or its position."""

    @property
    def id(self) -> str: ...
    @property
    def channel(self) -> str: ...
    @property
    def position(self) -> int: ...


_Named = TypeVar("_Named", bound=Named)


@dataclass(frozen=True, slots=True)
class Parked:
    """A parked event. ``id`` is what `operations.retry` takes."""

    pk: int
    id: str
    channel: str
    type: str
    position: int
    slot: int
    attempts: int
    parked_at: datetime
    #: Whether it is to be tried again, and no process has done so yet.
    retry: bool
    error: str
    traceback: str
    data: str


@dataclass(frozen=True, slots=True)
class Failing:
    """A slot that fails or has stopped. ``id`` is what `operations.skip` takes."""

    slot: int
    #: The id of the event, or its position if it is not stored any more. Empty if no event is to
    #: blame: the error says what is wrong.
    id: str
    channel: str
    position: int
    attempts: int
    error: str
    #: The seconds until the next attempt. None if it has stopped.
    retry_seconds: float | None
    stopped: bool


def find_consumer(connection: Connection, name: str) -> int:
    """The id of a consumer. Raises `UnknownConsumer`."""
    row = connection.execute(
        "SELECT id FROM pg_eventstream_consumer WHERE name = %s", [name]
    ).fetchone()
    if row is None:
        raise unknown_consumer(connection, name)
    return int(row[0])


def unknown_consumer(connection: Connection, name: str) -> UnknownConsumer:
    """An error that says which consumers there are."""
    rows = connection.execute(
        "SELECT name, %s = ANY(former_names) FROM pg_eventstream_consumer ORDER BY name", [name]
    ).fetchall()
    if renamed := [other for other, had_name in rows if had_name]:
        return UnknownConsumer(f"The consumer {name!r} was renamed to {renamed[0]!r}.")
    if name in discover():
        return UnknownConsumer(
            f"The consumer {name!r} has never run, so nothing is stored about it. Start it:"
            f" manage.py eventstream_consumers run {name}"
        )
    names = [other for other, _ in rows]
    close = difflib.get_close_matches(name, names, 1)
    return UnknownConsumer(
        f"There is no consumer {name!r}."
        + (f" Did you mean {close[0]!r}?" if close else "")
        + f" There are: {', '.join(map(repr, names)) or 'none'}."
    )


def match(events: Sequence[_Named], text: str) -> _Named | None:
    """The event with this id or position."""
    if text.isascii() and text.removeprefix("-").isdigit():
        return next((event for event in events if event.position == int(text)), None)
    try:
        # A digest in an id stands for a long name.
        numbers = sse.parse_id(text, {event.channel for event in events})
    except EventStreamError:
        return None
    wanted = sse.make_id(numbers)
    return next((event for event in events if event.id == wanted), None)


# Reading


_PARKED = """
    SELECT id, channel, number, type, position, slot, attempts, parked_at, retry,
           CASE WHEN %(content)s <> 'none' THEN error ELSE '' END,
           CASE WHEN %(content)s IN ('shortened', 'all') THEN traceback ELSE '' END,
           CASE WHEN %(content)s = 'all' THEN data
                WHEN %(content)s = 'shortened' AND length(data) > %(length)s
                THEN left(data, %(length)s) || '…'
                WHEN %(content)s = 'shortened' THEN data
                ELSE '' END
      FROM pg_eventstream_parked WHERE consumer_id = %(id)s
     ORDER BY position, id LIMIT %(most)s OFFSET %(skipped)s
"""
#: The characters of the data that are shown of an event among others.
_SHORTENED = 5000


def list_parked(
    connection: Connection,
    consumer_id: int,
    *,
    content: Literal["none", "error", "shortened", "all"] = "none",
    most: int | None = None,
    skipped: int = 0,
) -> list[Parked]:
    """The parked events, in their order. ``content`` says what is read besides their places.

    With "shortened" that is all, but only the beginning of large data.
    """
    rows = connection.execute(
        _PARKED,
        {
            "id": consumer_id,
            "content": content,
            "most": most,
            "skipped": skipped,
            "length": _SHORTENED,
        },
    ).fetchall()
    return [
        Parked(pk, event_id(channel, number), channel, *rest) for pk, channel, number, *rest in rows
    ]


_FAILING = """
    SELECT slot, s.channel, s.eid + coalesce(s.incarnation, 0), failing, attempts, error,
           greatest(extract(epoch FROM retry_at - clock_timestamp()), 0)::float8, stopped
      FROM pg_eventstream_slot LEFT JOIN pg_eventstream_stream AS s ON s.position = failing
     WHERE consumer_id = %s AND (failing IS NOT NULL OR stopped)
     ORDER BY slot
"""


def list_failing(connection: Connection, consumer_id: int) -> list[Failing]:
    """The slots that fail or have stopped."""
    found = []
    for row in connection.execute(_FAILING, [consumer_id]).fetchall():
        slot, channel, number, position, *rest = row
        name = "" if position is None else str(position)
        if channel is not None:
            name = event_id(channel, number)
        found.append(Failing(slot, name, channel or "", position or 0, *rest))
    return found


def held_slots(connection: Connection, consumer_id: int) -> set[int]:
    """The slots of a consumer that processes hold now."""
    rows = connection.execute(f"SELECT lock FROM {CONSUMER_LOCKS} AS held").fetchall()  # noqa: S608
    held = [owner_of(lock) for (lock,) in rows]
    return {slot for owner, slot in held if owner == consumer_id and slot != MEMBER}
