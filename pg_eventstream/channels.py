"""Valid channel names, and whether the events of a channel have ids."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable

from django.db import close_old_connections

from .channelmanager import get_channelmanager
from .errors import InvalidRequest

logger = logging.getLogger(__name__)

#: Channels whose names begin like this are reserved: no client may name them.
RESERVED = "pg_eventstream:"
#: The reserved channel of permission changes, which are in order with all events.
PERMISSION_CHANGES = f"{RESERVED}permission"
#: The reserved channel of the doctor's probes, which only the doctor's token opens.
DOCTOR = f"{RESERVED}doctor"
#: Characters in the name of a channel or of an event type, which are varchar(255).
NAME_LENGTH = 255

_LINE_BREAK_OR_NUL = re.compile(r"[\r\n\0]")


def problem_of_name(name: str) -> str | None:
    """Why this name is invalid for a channel or an event type; None if it is valid.

    The table's CHECK constraints refuse the same names from senders in other languages.
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
    """The channels without duplicates.

    Raises `InvalidRequest` for a string, which would be one channel per character.
    """
    if isinstance(channels, str):
        raise InvalidRequest(f"The channels must be a list, such as [{channels!r}].")
    return tuple(dict.fromkeys(channels))


def is_reliable(channel: str) -> bool:
    """Whether the events of the channel have ids, according to the channel manager.

    True if the manager raises, which is no reason to stop all streams or to prune events.
    """
    return bool(reliable([channel]))


def reliable(channels: Iterable[str]) -> list[str]:
    """The channels whose events have ids: those for which `is_reliable` is true."""
    ask: Callable[[str], bool] | None = None
    found = []
    for channel in channels:
        if channel.startswith(RESERVED):
            answer = channel == DOCTOR
        else:
            try:
                # Once for all channels: reading a setting takes longer than asking.
                ask = ask or get_channelmanager().is_channel_reliable
                answer = ask(channel)
            except Exception:
                # A manager that queries the database could have used a broken connection.
                close_old_connections()
                logger.exception(
                    "is_channel_reliable(%r) failed; assuming that it is reliable",
                    channel,
                    extra={"event": "channel-manager-failed", "channel": channel},
                )
                answer = True
        if answer:
            found.append(channel)
    return found
