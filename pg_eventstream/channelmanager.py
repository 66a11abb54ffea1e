"""Decides who may read which channel, and which channels a request asks for.

Subclass `DefaultChannelManager` (or `ChannelManagerBase`) and name it in
``EVENTSTREAM_CHANNELMANAGER_CLASS``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.utils.module_loading import import_string

from .conf import conf

if TYPE_CHECKING:
    from django.contrib.auth.models import AbstractBaseUser

__all__ = ["ChannelManagerBase", "DefaultChannelManager"]


class ChannelManagerBase:
    """The decisions that the endpoint and the publisher leave to the project.

    One instance serves all requests of a process, so keep no state in it.
    """

    def get_channels_for_request(
        self, request: HttpRequest, view_kwargs: Mapping[str, Any]
    ) -> Collection[str]:
        """The channels that the request asks for."""
        raise NotImplementedError

    def can_read_channel(self, user: Any, channel: str) -> bool:
        """Whether the user, or an anonymous visitor (None), may read the channel.

        Called when a stream is opened, whenever the proxy asks how to continue it, and after
        `channel_permission_changed`.
        """
        raise NotImplementedError

    def is_channel_reliable(self, channel: str) -> bool:
        """Whether the events of the channel have ids, so that clients can resume.

        The publisher calls it for each event and the endpoint for each stream, in different
        processes: the result must depend on the name alone and never change.
        """
        raise NotImplementedError

    def get_user_for_request(self, request: HttpRequest) -> AbstractBaseUser | None:
        """The user who opens the stream; None for an anonymous visitor.

        By default, the user that Django's authentication found. Override it for tokens: the
        request has the client's headers and query. Raise
        `django.core.exceptions.PermissionDenied` to refuse the whole request.
        """
        user = getattr(request, "user", None)
        return user if user is not None and user.is_authenticated else None

    def get_user(self, user_id: str) -> AbstractBaseUser | None:
        """The user with this primary key; None if there is none or the user is inactive.

        Called when a stream continues: the proxy's own requests carry no cookies or tokens of the
        client, only the key of the user that `get_user_for_request` returned.
        """
        user = get_user_model()._default_manager.filter(pk=user_id).first()
        return user if user is not None and user.is_active else None


class DefaultChannelManager(ChannelManagerBase):
    """Channels come from the URLconf or else the query; all are reliable and open to everyone."""

    def get_channels_for_request(
        self, request: HttpRequest, view_kwargs: Mapping[str, Any]
    ) -> Collection[str]:
        """The first that is set: ``format-channels``, ``channels``, ``channel``, ``?channel=``.

        The first three are kwargs of the URLconf. They take precedence over the query.
        """
        if "format-channels" in view_kwargs:
            formats = _as_list("format-channels", view_kwargs["format-channels"])
            return [name.format(**view_kwargs) for name in formats]
        if "channels" in view_kwargs:
            return _as_list("channels", view_kwargs["channels"])
        if "channel" in view_kwargs:
            return [view_kwargs["channel"]]
        return request.GET.getlist("channel")

    def can_read_channel(self, user: Any, channel: str) -> bool:
        return True

    def is_channel_reliable(self, channel: str) -> bool:
        return True


#: The remedy if the setting does not name a channel manager.
HINT = "Set it to a subclass of pg_eventstream.channelmanager.DefaultChannelManager."


def get_channelmanager() -> ChannelManagerBase:
    return _instance(conf.channelmanager_class)


@cache
def _instance(path: str) -> ChannelManagerBase:
    return load_class(path)()


def load_class(path: str) -> type[ChannelManagerBase]:
    """The class at a dotted path. Raises `ImproperlyConfigured` if it is not a channel manager."""
    try:
        manager = import_string(path)
    except ImportError as e:
        raise ImproperlyConfigured(
            f"EVENTSTREAM_CHANNELMANAGER_CLASS {path!r} cannot be imported: {e}."
        ) from e
    if isinstance(manager, type) and issubclass(manager, ChannelManagerBase):
        return manager
    raise ImproperlyConfigured(
        f"EVENTSTREAM_CHANNELMANAGER_CLASS {path!r} is not a subclass of ChannelManagerBase. {HINT}"
    )


def _as_list(kwarg: str, names: Collection[str]) -> list[str]:
    if isinstance(names, str):  # a collection as well, of one channel per character
        raise ImproperlyConfigured(
            f"{kwarg!r} in the URLconf must be a list of channels, such as [{names!r}]."
        )
    return list(names)
