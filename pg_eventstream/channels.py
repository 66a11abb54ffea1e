"""What a channel may be called, and whether its events have ids."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from django.db import close_old_connections

from .channelmanager import get_channelmanager
from .errors import InvalidRequest

logger = logging.getLogger(__name__)

#: Channels whose name begins like this are the library's own: no client may read them.
RESERVED = "pg_eventstream:"
#: The channel of our own that says whose permission changed, in order with all events.
PERMISSION_CHANGES = f"{RESERVED}permission"
#: Characters in the name of a channel or of an event type, which are varchar(255).
NAME_LENGTH = 255

_LINE_BREAK_OR_NUL = re.compile(r"[\r\n\0]")


def problem_of_name(name: str) -> str | None:
    """Why no channel and no event type can have this name, None if one can.

    The table's CHECK constraints refuse the same names from senders that are not Python.
    """
    if not name:
        return "must not be empty"
    if len(name) > NAME_LENGTH:
        return f"has {len(name)} characters; the limit is {NAME_LENGTH}"
    if _LINE_BREAK_OR_NUL.search(name):
        return "must not contain CR, LF or NUL"
    try:
        name.encode()
    except UnicodeEncodeError as e:
        return f"is not valid Unicode: {e}"
    return None


def channel_names(channels: Iterable[str]) -> tuple[str, ...]:
    """The channels, each once. Raises `InvalidRequest` for a string.

    A string would be a channel for each of its characters.
    """
    if isinstance(channels, str):
        raise InvalidRequest(f"The channels must be a list: [{channels!r}].")
    return tuple(dict.fromkeys(channels))


def is_reliable(channel: str) -> bool:
    """Whether the events of the channel have ids, as the channel manager says.

    True if the manager fails: that is no reason to stop all streams, or to prune events.
    """
    if channel.startswith(RESERVED):
        return False
    try:
        return get_channelmanager().is_channel_reliable(channel)
    except Exception:
        # A manager that asks the database may have met a connection that broke long ago.
        close_old_connections()
        logger.exception("is_channel_reliable(%r) failed; assuming that it is reliable", channel)
        return True


def reliable(channels: Iterable[str]) -> list[str]:
    """Those of the channels whose events have ids."""
    return [channel for channel in channels if is_reliable(channel)]
