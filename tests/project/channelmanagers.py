"""The channel managers that test settings name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

from django.contrib.auth.models import AbstractBaseUser, User
from django.core.exceptions import PermissionDenied
from django.db import connection
from django.http import HttpRequest

from pg_eventstream.channelmanager import DefaultChannelManager
from pg_eventstream.channels import DOCTOR, PERMISSION_CHANGES
from tests.project.app.models import Membership


class StaffOnly(DefaultChannelManager):
    """Channels whose name begins with "staff" are for staff."""

    def can_read_channel(self, user: AbstractBaseUser | None, channel: str) -> bool:
        return not channel.startswith("staff") or (isinstance(user, User) and user.is_staff)


class Members(DefaultChannelManager):
    """Channels are for those who have a `Membership`, except the public ones."""

    def can_read_channel(self, user: AbstractBaseUser | None, channel: str) -> bool:
        user_id = None if user is None else user.pk
        return (
            channel.startswith("public")
            or Membership.objects.filter(user_id=user_id, channel=channel).exists()
        )


class SlowMembers(Members):
    """Reports by NOTIFY that it has decided, then waits for an advisory lock."""

    GATE = 4711
    DECIDED = "slow_members_decided"

    def can_read_channel(self, user: AbstractBaseUser | None, channel: str) -> bool:
        decision = super().can_read_channel(user, channel)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_notify(%s, '')", [self.DECIDED])
            cursor.execute("SELECT pg_advisory_lock_shared(%s)", [self.GATE])
            cursor.execute("SELECT pg_advisory_unlock_shared(%s)", [self.GATE])
        return decision


class Racing(DefaultChannelManager):
    """The permission is revoked just after it was granted."""

    allowed = True
    meanwhile: ClassVar[list[Callable[[], None]]] = []

    def can_read_channel(self, user: AbstractBaseUser | None, channel: str) -> bool:
        decision = Racing.allowed
        while Racing.meanwhile:
            Racing.meanwhile.pop()()
        return decision


class Volatile(DefaultChannelManager):
    """Channels whose name begins with "volatile" are not reliable."""

    def is_channel_reliable(self, channel: str) -> bool:
        return not channel.startswith("volatile")


class ObservedVolatile(Volatile):
    """Says by NOTIFY which channel it is asked about."""

    ASKED = "observed_volatile_asked"

    def can_read_channel(self, user: AbstractBaseUser | None, channel: str) -> bool:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_notify(%s, %s)", [self.ASKED, channel])
        return super().can_read_channel(user, channel)


class VolatileMembers(Members, Volatile):
    """Combines both."""


class Tokens(DefaultChannelManager):
    """A user sends a token, ``user-NAME``, and may read the channel of that name."""

    def get_user_for_request(self, request: HttpRequest) -> AbstractBaseUser | None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if not token:
            return None
        if scheme != "Bearer" or not token.startswith("user-"):
            raise PermissionDenied("This is not a valid token.")
        return User.objects.get(username=token.removeprefix("user-"))

    def can_read_channel(self, user: AbstractBaseUser | None, channel: str) -> bool:
        return user is not None and channel == f"of {user.get_username()}"


class LoneSurrogates(DefaultChannelManager):
    """Names channels after bytes that are not UTF-8."""

    def get_channels_for_request(
        self, request: HttpRequest, view_kwargs: Mapping[str, Any]
    ) -> Collection[str]:
        return ["a\udcff"]


class TextKeys(DefaultChannelManager):
    """Users with a text as primary key, given by the header X-User. Each may read one channel."""

    def get_user_for_request(self, request: HttpRequest) -> AbstractBaseUser | None:
        return self.get_user(request.headers["X-User"]) if "X-User" in request.headers else None

    def get_user(self, user_id: str) -> AbstractBaseUser | None:
        return User(pk=user_id, username=user_id)

    def can_read_channel(self, user: AbstractBaseUser | None, channel: str) -> bool:
        name = "visitors" if user is None else f"of {user.pk}"
        return channel.startswith("public") or channel == name


class AsksWhatIsReliable(DefaultChannelManager):
    """Queries the database whenever events are read, slowly."""

    def is_channel_reliable(self, channel: str) -> bool:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.05)")
        return True


class NamesReservedChannels(DefaultChannelManager):
    """Names all reserved channels, whatever the request asks for."""

    def get_channels_for_request(
        self, request: HttpRequest, view_kwargs: Mapping[str, Any]
    ) -> Collection[str]:
        return [PERMISSION_CHANGES, DOCTOR]
