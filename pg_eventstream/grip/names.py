"""The GRIP channels of our channels and users, and text that passes the proxy's filters."""

from __future__ import annotations

from .. import sse

#: How the GRIP channel of a channel begins whose events have ids.
EVENTS = "events-"
_UNRELIABLE = "unreliable-"
_USER = "user-"


def events_channel(channel: str, reliable: bool = True) -> str:
    """The GRIP channel that carries the events of a channel.

    Another one if they have no ids: an item without would end the search for gaps on a channel
    that is held with prev-id.
    """
    return (EVENTS if reliable else _UNRELIABLE) + sse.quote_channel(channel)


def user_channel(user_id: str) -> str:
    """The GRIP channel that reaches all streams of one user. Held without prev-id."""
    return _USER + quote_user(user_id)


def quote_user(user_id: str) -> str:
    """A user id inside a header, or between the commas of a list of them."""
    return sse.quote_name(user_id, 128)


def escape(text: str) -> str:
    """Text that passes the proxy's build-id filter unchanged."""
    return text.replace("%", "%%")
