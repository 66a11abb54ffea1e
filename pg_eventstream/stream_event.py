"""The rows of the stream, decoded: events, and changes of permission among them."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field

from . import sse
from .channels import NAME_LENGTH, PERMISSION_CHANGES, is_reliable

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StreamEvent:
    """A sequenced event. ``data`` is None if it was too large to be read here.

    ``number`` is what the event's id shows. ``prev`` is what the id of the channel's event before
    it shows: one less, unless this is the first event of its channel in an incarnation of the
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
    #: As it was encoded last, and with which id: the same for all streams of one channel.
    _encoded: tuple[str | None, str] | None = field(default=None, repr=False, compare=False)

    @property
    def is_first_of_incarnation(self) -> bool:
        return self.prev != self.number - 1

    def encode(self, event_id: str | None) -> str:
        """The event as Server-Sent Event, for a stream whose id after it is this.

        Nothing for a type of the server's own, which the table refused too late.
        """
        if self._encoded is None or self._encoded[0] != event_id:
            text = ""
            if self.type not in sse.RESERVED_TYPES:
                text = sse.encode_event(self.type, self.data or "", event_id)
            self._encoded = (event_id, text)
        return self._encoded[1]


@dataclass(frozen=True, slots=True)
class PermissionChange:
    """The permission of a user for a channel may have changed at this place in the stream."""

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
    """One row of the stream. ``prev`` is as in the table: None for one less than the number.

    ``reliable`` spares asking the channel manager once more.
    A change of permission that cannot be read is one of nobody: any sender may write one.
    """
    if channel == PERMISSION_CHANGES:
        try:
            user, channel = parse_change(data or "")
        except ValueError as e:
            logger.error("event %d is no change of permission (%s): ignored", position, e)
            user = channel = ""
        return PermissionChange(position, user, channel)
    if reliable is None:
        reliable = is_reliable(channel)
    if prev is None:
        prev = number - 1
    return StreamEvent(position, channel, number, prev, event_type, data, skip_user_ids, reliable)


def encode_change(user: str, channel: str) -> str:
    """The data of a change of permission."""
    return json.dumps({"user": user, "channel": channel})


def parse_change(data: str) -> tuple[str, str]:
    """The user id and the channel of a change of permission.

    Raises `ValueError` if the data is not what `encode_change` writes.
    """
    try:
        change = json.loads(data)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    match change:
        case {"user": str() as user, "channel": str() as channel} if (
            max(len(user), len(channel)) <= NAME_LENGTH
        ):
            (user + channel).encode()  # no lone surrogates, which JSON can hold
            return user, channel
    raise ValueError("neither user nor channel")
