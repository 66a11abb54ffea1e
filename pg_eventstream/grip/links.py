"""Next links: what the proxy asks when a stream has a gap, or has been quiet for a while.

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

from .. import sse
from ..conf import conf
from ..errors import InvalidRequest
from .names import EVENTS

#: What a next link adds to the path of its stream, before the token. No segment of its own: a
#: mount that ends in a path converter would swallow it.
NEXT = "next-"

_SIGNER_SALT = "pg_eventstream.next-link"
#: How long a link works. Of a stream that is held it is worth nothing without Grip-Last, which
#: only the proxy says. Between two pages it is worth the next one to whoever finds it in a log; but
#: the proxy asks at once, and a client whose link has expired comes back.
_LINK_HOURS, _PAGE_LINK_HOURS = 24, 1


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
    prefix = conf.grip_prefix + EVENTS
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
