"""How users are named: in ``skip_user_ids``, in links, at the proxy, in changes of permission."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .errors import InvalidEvent

if TYPE_CHECKING:
    from django.contrib.auth.models import AbstractBaseUser, AnonymousUser

#: In place of a primary key: visitors that are not logged in.
ANONYMOUS = "anonymous"

# Keys that look like that name, or like one that is escaped: a backslash more tells them apart.
_ALIKE = re.compile(r"\\*anonymous")


def user_id(user: AbstractBaseUser | AnonymousUser | None) -> str:
    r"""The user's primary key as text; ``anonymous`` for visitors.

    A user whose key is that very text is ``\anonymous``, so that no two have the same name.

    Raises `InvalidEvent` if the user has no primary key, not yet or not any more.
    """
    if user is None or getattr(user, "is_anonymous", False):
        return ANONYMOUS
    if user.pk is None:
        raise InvalidEvent(
            f"The user {user} has no primary key. Before it is saved it has no streams; if it is"
            " to be deleted, call this before."
        )
    return _escape(str(user.pk))


def primary_key(user_id: str) -> str | None:
    """The primary key of the user with this name, None for visitors."""
    if user_id == ANONYMOUS:
        return None
    return user_id[1:] if _ALIKE.fullmatch(user_id) else user_id


def skipped_ids(user: object) -> list[str]:
    """What stands in ``skip_user_ids`` for a user, its primary key, or None for visitors.

    The bare text ``anonymous`` could mean either, and is both.
    """
    if user is None or hasattr(user, "pk"):
        return [user_id(user)]  # type: ignore[arg-type]
    key = str(user)
    return [ANONYMOUS, _escape(key)] if key == ANONYMOUS else [_escape(key)]


def _escape(key: str) -> str:
    return f"\\{key}" if _ALIKE.fullmatch(key) else key
