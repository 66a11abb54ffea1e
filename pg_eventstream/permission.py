"""Who may read: checked when a stream opens and continues, and when permissions change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .channelmanager import get_channelmanager
from .channels import PERMISSION_CHANGES
from .errors import EventPermissionError
from .send import check_name, insert
from .stream_event import encode_change
from .users import user_id

if TYPE_CHECKING:
    from django.contrib.auth.models import AbstractBaseUser, AnonymousUser


def check_permission(
    user: AbstractBaseUser | AnonymousUser | None, channels: Iterable[str]
) -> None:
    """Raise `EventPermissionError` with the channels that the user may not read."""
    if getattr(user, "is_anonymous", False):
        user = None  # for channel managers, visitors who are not logged in are None
    manager = get_channelmanager()
    refused = [channel for channel in channels if not manager.can_read_channel(user, channel)]
    if refused:
        raise EventPermissionError(refused)


def channel_permission_changed(
    user: AbstractBaseUser | AnonymousUser | None, channel: str, using: str | None = None
) -> None:
    """End the user's open streams of the channel, unless the user may still read it.

    Call it in the transaction that makes the change. If that commits, the channel manager is called
    again for each stream of the user (None for anonymous visitors) that has the channel, at every
    proxy. Streams without permission end with a ``stream-error``; no event that commits later
    reaches them. If the transaction is rolled back, nothing happens.

    Raises `InvalidEvent` if the user has no primary key, as after ``user.delete()``, or if the
    channel name is invalid.
    """
    change = encode_change(user_id(user), check_name("channel", channel))
    insert((PERMISSION_CHANGES, "permission-changed", change, [], None), using)
