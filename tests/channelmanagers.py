"""Channel managers that test settings name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from django.contrib.auth.models import AbstractBaseUser, User
from django.http import HttpRequest

from pg_eventstream.channelmanager import DefaultChannelManager


class StaffOnly(DefaultChannelManager):
    """Channels whose name begins with "staff" are for staff."""

    def can_read_channel(self, user: AbstractBaseUser | None, channel: str) -> bool:
        return not channel.startswith("staff") or (isinstance(user, User) and user.is_staff)


class LoneSurrogates(DefaultChannelManager):
    """Names channels after bytes that were no UTF-8."""

    def get_channels_for_request(
        self, request: HttpRequest, view_kwargs: Mapping[str, Any]
    ) -> Collection[str]:
        return ["a\udcff"]
