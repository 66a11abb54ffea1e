"""Who may read which channel, and which channels a request asks for.

Subclass `DefaultChannelManager` (or `ChannelManagerBase`) and name it in
``EVENTSTREAM_CHANNELMANAGER_CLASS``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from django.http import HttpRequest
from django.utils.module_loading import import_string

from .conf import conf

if TYPE_CHECKING:
    from django.contrib.auth.models import AbstractBaseUser


class ChannelManagerBase:
    """What the endpoint asks. One instance serves all requests, so keep no state in it."""

    def get_channels_for_request(
        self, request: HttpRequest, view_kwargs: Mapping[str, Any]
    ) -> Collection[str]:
        """The channels that the request asks for."""
        raise NotImplementedError

    def can_read_channel(self, user: AbstractBaseUser | None, channel: str) -> bool:
        """Whether the user, or an anonymous visitor (None), may read the channel.

        Asked when a stream is opened, and again whenever the proxy asks how to go on.
        """
        raise NotImplementedError


class DefaultChannelManager(ChannelManagerBase):
    """Channels by the URLconf, else by the query; everybody may read everything."""

    def get_channels_for_request(
        self, request: HttpRequest, view_kwargs: Mapping[str, Any]
    ) -> Collection[str]:
        """The first that is there: ``format-channels``, ``channels``, ``channel``, ``?channel=``.

        What the URLconf says excludes what the query says.
        """
        if "format-channels" in view_kwargs:
            return [name.format(**view_kwargs) for name in view_kwargs["format-channels"]]
        if "channels" in view_kwargs:
            return list(view_kwargs["channels"])
        if "channel" in view_kwargs:
            return [view_kwargs["channel"]]
        return request.GET.getlist("channel")

    def can_read_channel(self, user: AbstractBaseUser | None, channel: str) -> bool:
        return True


def get_channelmanager() -> ChannelManagerBase:
    return _instance(conf.channelmanager_class)


@cache
def _instance(path: str) -> ChannelManagerBase:
    manager = import_string(path)()
    assert isinstance(manager, ChannelManagerBase)  # noqa: S101  (system check E007)
    return manager
