"""Instructs the proxy to hold a stream open, and tells it how to continue.

The proxy keeps the connection, sends the items that are published on its channels, and checks that
the prev-id of each item is the last id that it sent. If one does not match, or after a timeout, it
requests the stream's next link and continues with the response.
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

    ``ids`` has the eids of the reliable channels. The stream is either held after these ids
    (``held``), or the proxy requests the link at once for the next page, or there is no link and
    the stream ends. In all three cases the response has the channels and their filters, and its
    body must be escaped: Pushpin 1.36 filters the response of a link with the filters of the
    previous response, 1.41 with its own. (Pushpin 1.36 crashes if it filters a single %.)

    ``ask_soon`` is for a stream that opens in several pages. The proxy compares a stream's ids with
    the channels' last ones only if its first response holds it (Pushpin:
    src/handler/httpsession.cpp, prepareToSendQueueOrHold). Without it, events published between the
    last page and the hold would wait for the channel's next event.
    """
    instruct = request.grip.start_instruct()
    if link is not None:
        timeout = _SOON_SECONDS if ask_soon else conf.next_link_timeout
        # reverse() leaves commas and semicolons in a path, at which the proxy splits a header.
        instruct.set_next_link(quote(link, safe="/:%"), timeout=timeout)
    if held:
        instruct.set_hold_stream()
        instruct.set_keep_alive(sse.KEEP_ALIVE, sse.KEEP_ALIVE_SECONDS)
    # The user's channel comes first: if the proxy drops channels, events are missing but never a
    # permission change.
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
    """The text that the proxy appends to an event's own id: the last ids of all reliable channels.

    The own id is in the item, because in Pushpin 1.41 %I stands for the previous id of the item's
    channel (in 1.36 for the current one). A single channel needs no more ids, but an empty format
    is an error, so it gets a space.
    """
    if len(channels) < 2:
        return " "
    return "".join(
        f",{escape(sse.quote_channel(channel))}:%({conf.grip_prefix}{events_channel(channel)})s"
        for channel in channels
    )
