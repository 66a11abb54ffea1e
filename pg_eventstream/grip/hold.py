"""Tells a GRIP proxy to hold a stream open, and how to go on when it has a question.

The proxy keeps the connection, sends what is published on its channels, and checks that
each item's prev-id is the id it sent last. When one does not match, or after a while, it
fetches the stream's next link and goes on from the response.

Sessions on the same path with the same Grip-Last share one fetch, whatever the query says
(Pushpin: src/handler/handlerengine.cpp, "Auto share"). So everything that the response
depends on - channels, user, cursor - stands in the path, signed; and links are equal for
equal sessions, because the proxy fetches distinct ones at 10 a second only.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from django.core import signing
from gripcontrol import Channel

from .. import sse
from ..conf import conf
from ..errors import InvalidRequest

#: What a next link adds to the path of its stream, before the token. No segment of its own: a
#: mount that ends in a path converter would swallow it.
NEXT = "next-"

_SIGNER_SALT = "pg_eventstream.next-link"
#: How long a link works. Of a stream that is held it is worth nothing without Grip-Last, which
#: only the proxy says. Between two pages it is worth the next one to whoever finds it in a log; but
#: the proxy asks at once, and a client whose link has expired comes back.
_LINK_HOURS, _PAGE_LINK_HOURS = 24, 1
_SOON_SECONDS = 1
_EVENTS = "events-"
_UNRELIABLE = "unreliable-"
_USER = "user-"


def events_channel(channel: str, reliable: bool = True) -> str:
    """The GRIP channel that carries the events of a channel.

    Another one if they have no ids: an item without would end the search for gaps on a channel
    that is held with prev-id.
    """
    return (_EVENTS if reliable else _UNRELIABLE) + sse.quote_channel(channel)


def user_channel(user_id: str) -> str:
    """The GRIP channel that reaches all streams of one user. Held without prev-id."""
    return _USER + quote_user(user_id)


def quote_user(user_id: str) -> str:
    """A user id inside a header, or between the commas of a list of them."""
    return sse.quote_name(user_id, 128)


@dataclass(frozen=True, slots=True)
class Session:
    """What a next link says of the stream that it belongs to.

    ``cursor`` is there between two pages of a recovery; otherwise the proxy knows the ids
    and sends them in Grip-Last.
    """

    channels: tuple[str, ...]
    user_id: str
    cursor: Mapping[str, int] | None = None


def sign(session: Session) -> str:
    """The session as a token for a path. Equal sessions get equal tokens, for an hour."""
    hour = int(time.time() // 3600)
    hours = _LINK_HOURS if session.cursor is None else _PAGE_LINK_HOURS
    content: dict[str, Any] = {
        "c": session.channels,
        "u": session.user_id,
        "x": hour + 1 + hours,
    }
    if session.cursor is not None:
        content["l"] = [session.cursor.get(channel) for channel in session.channels]
    return signing.Signer(salt=_SIGNER_SALT).sign_object(content, compress=True)


def unsign(token: str) -> Session:
    """The session of a token. Raises `InvalidRequest` if we did not sign it, or long ago."""
    try:
        content = signing.Signer(salt=_SIGNER_SALT).unsign_object(token)
    except signing.BadSignature as e:
        raise InvalidRequest("This link was not made here") from e
    if time.time() // 3600 >= content["x"]:
        raise InvalidRequest("This link has expired")
    channels = tuple(content["c"])
    cursor = None
    if "l" in content:
        ids = zip(channels, content["l"], strict=True)
        cursor = {channel: eid for channel, eid in ids if eid is not None}
    return Session(channels, content["u"], cursor)


def last_ids(grip_last: Mapping[str, str], channels: Collection[str]) -> dict[str, int]:
    """The eids that the proxy sent last on these channels, from the Grip-Last header.

    Raises `InvalidRequest` if an id is missing, or not one of ours: to go on from now
    would lose events silently, while a client that comes back loses none.
    """
    last: dict[str, int] = {}
    prefix = conf.grip_prefix + _EVENTS
    # The streams of an older version are held by long names in full.
    names = {quote(c): c for c in channels} | {sse.quote_channel(c): c for c in channels}
    for name, eid in grip_last.items():
        channel = names.get(name.removeprefix(prefix))
        if name.startswith(prefix) and channel is not None:
            if not (eid.isascii() and eid.isdigit() and len(eid) <= 18):
                raise InvalidRequest("Grip-Last is malformed")
            last[channel] = int(eid)
    if len(last) < len(channels):
        raise InvalidRequest("Grip-Last lacks a channel")
    return last


def instruct(
    request: Any,
    session: Session,
    ids: Mapping[str, int],
    *,
    link: str | None = None,
    held: bool = False,
    ask_soon: bool = False,
) -> None:
    """Give the proxy its instructions, through `django_grip.GripMiddleware`.

    ``ids`` has the eids of the reliable channels. The stream is either held from them on, or
    the proxy fetches the link at once, for the next page, or there is no link and the stream
    ends. The channels and their filters are there in all three cases, and the body is always
    to be escaped: to the answer of a link Pushpin 1.36 applies the filters of the answer
    before it, 1.41 its own. (A lone % that 1.36 filters makes it crash.)

    ``ask_soon`` is for a stream that opened in several pages. The proxy compares a stream's ids
    with the channels' last ones only if its first response holds it (Pushpin:
    src/handler/httpsession.cpp, prepareToSendQueueOrHold); what was published between the last
    page and the hold would otherwise wait for the channel's next event.
    """
    instruct = request.grip.start_instruct()
    if link is not None:
        timeout = _SOON_SECONDS if ask_soon else conf.next_link_timeout
        # reverse() leaves commas and semicolons in a path, at which the proxy splits a header.
        instruct.set_next_link(quote(link, safe="/:%"), timeout=timeout)
    if held:
        instruct.set_hold_stream()
        instruct.set_keep_alive(sse.KEEP_ALIVE, sse.KEEP_ALIVE_SECONDS)
    # The user's channel first: if the proxy holds fewer than there are, it is events that are
    # missing, and never a change of permission.
    grip_channel = Channel(user_channel(session.user_id))
    grip_channel.filters.append("require-sub")
    instruct.add_channel(grip_channel)
    for channel in session.channels:
        if channel in ids:
            grip_channel = Channel(events_channel(channel), prev_id=str(ids[channel]))
        else:
            grip_channel = Channel(events_channel(channel, reliable=False))
        grip_channel.filters += ["build-id", "skip-users"]
        instruct.add_channel(grip_channel)
    instruct.meta["id_format"] = id_format(ids)
    instruct.meta["user"] = quote_user(session.user_id)


def id_format(channels: Collection[str]) -> str:
    """What the proxy puts behind an event's own id: the last ids of all reliable channels.

    The own id stands in the item, since %I shows the previous one of the item's own
    channel on Pushpin 1.41 (1.36 shows the right one). A single channel needs none of it,
    but an empty format is an error, so it gets a space.
    """
    if len(channels) < 2:
        return " "
    return "".join(
        f",{escape(sse.quote_channel(channel))}:%({conf.grip_prefix}{events_channel(channel)})s"
        for channel in channels
    )


def escape(text: str) -> str:
    """Text that passes the proxy's build-id filter unchanged."""
    return text.replace("%", "%%")
