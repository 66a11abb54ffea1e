"""Instructs the proxy to hold a stream open, and tells it how to continue.

The proxy keeps the connection, sends what is published on its channels, and checks that
each item's prev-id is the id it sent last. When one does not match, or after a while, it
fetches the stream's next link and continues with the response.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote

from gripcontrol import Channel

from .. import sse
from ..conf import conf
from .links import Session
from .names import escape, events_channel, quote_user, user_channel

_SOON_SECONDS = 1


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
