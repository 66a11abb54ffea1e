"""Users of the channels of `tests.project.channelmanagers.Members`."""

from __future__ import annotations

from django.contrib.auth.models import User

from tests.project.app.models import Membership


def token(user: User) -> dict[str, str]:
    return {"Authorization": f"Token {user.username}"}


def member(name: str, *channels: str) -> User:
    user = User.objects.create_user(name)
    for channel in channels:
        Membership.objects.create(user_id=user.pk, channel=channel)
    return user
