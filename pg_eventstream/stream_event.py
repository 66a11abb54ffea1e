"""Decoded rows of the stream: events and permission changes."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field

from . import sse
from .channels import NAME_LENGTH, PERMISSION_CHANGES, is_reliable

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StreamEvent:
    """A sequenced event. ``data`` is None if it is too large to be read here.

    ``number`` is the number in the event's id, and ``prev`` the number in the id of the channel's
    previous event: one less, unless this is the first event of its channel in an incarnation of the
    stream. Events of channels that are not ``reliable`` have no ids.
    """

    position: int
    channel: str
    number: int
    prev: int
    type: str
    data: str | None
    skip_user_ids: list[str]
    reliable: bool = True
    #: The last id and the text encoded with it, which streams of the same channel share.
    _encoded: tuple[str | None, str] | None = field(default=None, repr=False, compare=False)

    @property
    def is_first_of_incarnation(self) -> bool:
        return self.prev != self.number - 1

    def encode(self, event_id: str | None) -> str:
        """The event as a Server-Sent Event with this id.

        The result is empty for reserved types, which older versions of the table accepted.
        """
        if self._encoded is None or self._encoded[0] != event_id:
            text = ""
            if self.type not in sse.RESERVED_TYPES:
                text = sse.encode_event(self.type, self.data or "", event_id)
            self._encoded = (event_id, text)
        return self._encoded[1]


@dataclass(frozen=True, slots=True)
class PermissionChange:
    """At this place in the stream, a user's permission for a channel may have changed."""

    position: int
    user: str
    channel: str


#: A row of the stream.
Row = StreamEvent | PermissionChange


def decode(
    position: int,
    channel: str,
    number: int,
    prev: int | None,
    event_type: str,
    data: str | None,
    skip_user_ids: list[str],
    reliable: bool | None = None,
) -> Row:
    """Decode a row of the stream. ``prev`` is as in the table: None for one less than ``number``.

    ``reliable`` avoids another call of the channel manager. Any sender can write a permission
    change, so one that cannot be read is decoded without user and channel, and affects no stream.
    """
    if channel == PERMISSION_CHANGES:
        try:
            user, channel = parse_change(data or "")
        except ValueError as e:
            logger.error(
                "event %d is not a valid permission change (%s); ignored",
                position,
                e,
                extra={"event": "permission-change-invalid", "position": position},
            )
            user = channel = ""
        return PermissionChange(position, user, channel)
    if reliable is None:
        reliable = is_reliable(channel)
    if prev is None:
        prev = number - 1
    return StreamEvent(position, channel, number, prev, event_type, data, skip_user_ids, reliable)


def encode_change(user: str, channel: str) -> str:
    """The data of a permission change."""
    return json.dumps({"user": user, "channel": channel})


def parse_change(data: str) -> tuple[str, str]:
    """The user id and the channel of a permission change.

    Raises `ValueError` if the data was not written by `encode_change`.
    """
    try:
        change = json.loads(data)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    match change:
        case {"user": str() as user, "channel": str() as channel} if (
            max(len(user), len(channel)) <= NAME_LENGTH
        ):
            (user + channel).encode()  # refuses lone surrogates, which JSON allows
            return user, channel
    raise ValueError("no user and channel")
