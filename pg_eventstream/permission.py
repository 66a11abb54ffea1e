"""Who may read: asked when a stream opens and goes on, and again when that changes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from django.db import close_old_connections

from .channelmanager import get_channelmanager
from .errors import EventPermissionError
from .send import NAME_LENGTH, RESERVED, check_name, insert
from .users import user_id

if TYPE_CHECKING:
    from django.contrib.auth.models import AbstractBaseUser, AnonymousUser

logger = logging.getLogger(__name__)

#: The channel of our own that says whose permission changed, in order with all events.
CHANGES = f"{RESERVED}permission"


def check_permission(
    user: AbstractBaseUser | AnonymousUser | None, channels: Iterable[str]
) -> None:
    """Raise `EventPermissionError` with the channels that the user may not read."""
    if getattr(user, "is_anonymous", False):
        user = None  # as managers know visitors who are not logged in
    manager = get_channelmanager()
    refused = [channel for channel in channels if not manager.can_read_channel(user, channel)]
    if refused:
        raise EventPermissionError(refused)


def is_reliable(channel: str) -> bool:
    """Whether the events of the channel have ids; as far as can be told, they do."""
    if channel.startswith(RESERVED):
        return False
    try:
        return get_channelmanager().is_channel_reliable(channel)
    except Exception:
        # Not to be able to tell is no reason to stop all streams, or to prune what matters. A
        # manager that asks the database may have met a connection that broke long ago.
        close_old_connections()
        logger.exception("is_channel_reliable(%r) failed; taken for reliable", channel)
        return True


def reliable(channels: Iterable[str]) -> list[str]:
    """Those of the channels whose events have ids."""
    return [channel for channel in channels if is_reliable(channel)]


def channel_permission_changed(
    user: AbstractBaseUser | AnonymousUser | None, channel: str, using: str | None = None
) -> None:
    """End the user's open streams of the channel, unless the user may still read it.

    Call it in the transaction that makes the change. If that commits, the channel manager
    is asked again for each stream of the user (None for anonymous visitors) that has the
    channel, at every proxy. Streams without permission end with a ``stream-error``; nothing
    that commits later reaches them. If it is rolled back, nothing happens.

    Raises `InvalidEvent` if the user has no primary key, as after ``user.delete()``, or if no
    channel can have that name.
    """
    change = json.dumps({"user": user_id(user), "channel": check_name("channel", channel)})
    insert((CHANGES, "permission-changed", change, []), using)


def parse_change(data: str) -> tuple[str, str]:
    """The user id and the channel of a change.

    Raises `ValueError` if it is not one of ours: whoever may send events may write one.
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
