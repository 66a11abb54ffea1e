"""The names of users in ``skip_user_ids``, in links, at the proxy, and in permission changes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .errors import InvalidEvent

if TYPE_CHECKING:
    from django.contrib.auth.models import AbstractBaseUser, AnonymousUser

#: Used instead of a primary key for visitors who are not logged in.
ANONYMOUS = "anonymous"

# Keys that look like that name or like an escaped one. They get one more backslash.
_ALIKE = re.compile(r"\\*anonymous")


def user_id(user: AbstractBaseUser | AnonymousUser | None) -> str:
    r"""The user's primary key as text; ``anonymous`` for visitors.

    A user whose key is exactly that text becomes ``\anonymous``, so that names are unique.

    Raises `InvalidEvent` if the user has no primary key, because it is not saved or was deleted.
    """
    if user is None or getattr(user, "is_anonymous", False):
        return ANONYMOUS
    if user.pk is None:
        raise InvalidEvent(
            f"The user {user} has no primary key. Call this after the user is saved, and before"
            " it is deleted."
        )
    return _escape(str(user.pk))


def primary_key(user_id: str) -> str | None:
    """The primary key of the user with this name; None for visitors."""
    if user_id == ANONYMOUS:
        return None
    return user_id[1:] if _ALIKE.fullmatch(user_id) else user_id


def skipped_ids(user: object) -> list[str]:
    """The names in ``skip_user_ids`` for a user, for a primary key, or for None (visitors).

    The text ``anonymous`` could mean visitors or a user with this key, so it stands for both.
    """
    if user is None or hasattr(user, "pk"):
        return [user_id(user)]  # type: ignore[arg-type]
    key = str(user)
    return [ANONYMOUS, _escape(key)] if key == ANONYMOUS else [_escape(key)]


def _escape(key: str) -> str:
    return f"\\{key}" if _ALIKE.fullmatch(key) else key
