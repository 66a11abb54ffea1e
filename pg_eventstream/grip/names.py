"""The GRIP channels of channels and users, and text that passes the proxy's filters."""

from __future__ import annotations

from .. import sse

#: The prefix of GRIP channels for channels whose events have ids.
EVENTS = "events-"
_UNRELIABLE = "unreliable-"
_USER = "user-"


def events_channel(channel: str, reliable: bool = True) -> str:
    """The GRIP channel for the events of a channel.

    Events without ids have another one, because an item without an id ends the detection of gaps on
    a channel that is held with prev-id.
    """
    return (EVENTS if reliable else _UNRELIABLE) + sse.quote_channel(channel)


def user_channel(user_id: str) -> str:
    """The GRIP channel of all streams of one user, which is held without prev-id."""
    return _USER + quote_user(user_id)


def quote_user(user_id: str) -> str:
    """A user id for a header or for a comma-separated list."""
    return sse.quote_name(user_id, 128)


def escape(text: str) -> str:
    """Escape text so that the proxy's build-id filter restores it."""
    return text.replace("%", "%%")
