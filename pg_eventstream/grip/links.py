"""Next links, which the proxy requests if a stream has a gap or has been quiet for a while.

Sessions with the same path and the same Grip-Last share one request, even if their queries differ
(Pushpin: src/handler/handlerengine.cpp, "Auto share"). So everything that the response depends on
(channels, user, cursor) is in the path, signed. Equal sessions have equal links, because the proxy
requests only 10 different links per second.
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

#: The text between the path of a stream and the token of its next link. It is not a separate path
#: segment, which a mount that ends in a path converter would match.
NEXT = "next-"

_SIGNER_SALT = "pg_eventstream.next-link"
#: The validity of links. The link of a stream that is held needs Grip-Last, which only the proxy
#: can set. A link between two pages gives the next page to anyone who finds it in a log, so it
#: expires earlier: the proxy requests it at once, and a client whose link has expired reconnects.
_LINK_HOURS, _PAGE_LINK_HOURS = 24, 1


@dataclass(frozen=True, slots=True)
class Session:
    """The stream of a next link.

    ``cursor`` is set between two pages of missed events. Otherwise the proxy knows the ids and
    sends them in Grip-Last.
    """

    channels: tuple[str, ...]
    user_id: str
    cursor: Mapping[str, int] | None = None


def sign(session: Session) -> str:
    """Sign a session as a token for a path. Equal sessions get equal tokens within an hour."""
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
    """The session of a token. Raises `InvalidRequest` if it was not signed here or has expired."""
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
    """The last eids that the proxy has sent on these channels, from the Grip-Last header.

    Raises `InvalidRequest` if an id is missing or invalid. Continuing from now would silently lose
    events, but a client that reconnects loses none.
    """
    last: dict[str, int] = {}
    prefix = conf.grip_prefix + EVENTS
    # Streams of an older version are held by long names without a digest.
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
