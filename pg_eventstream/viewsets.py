"""The endpoint as views of Django REST Framework.

DRF's authentication, permissions and throttles decide who may open a stream and as which user. The
channel manager decides, as in the plain endpoint, which channels that user may read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponseBase
from django.urls import NoReverseMatch
from django.utils.decorators import method_decorator
from rest_framework.decorators import action
from rest_framework.exceptions import ParseError
from rest_framework.renderers import BaseRenderer, BrowsableAPIRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.schemas.inspectors import ViewInspector
from rest_framework.settings import api_settings
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSetMixin

from . import cors, endpoint, views
from .caching import never_cached
from .channelmanager import get_channelmanager
from .renderers import BrowsableAPIEventStreamRenderer, SSEEventRenderer, StreamDescription

__all__ = ["EventsView", "EventsViewSet", "configure_events_view_set"]

# Kwargs of the URLconf that name channels for a channel manager. The query cannot replace them.
_NAMING = frozenset({"format-channels", "channels", "channel"})


def _renderers(configured: Sequence[Any]) -> list[type[BaseRenderer]]:
    """Select the renderers of events. Without any, there is a page if other views have one.

    The renderer of streams comes first: a client that accepts any media type gets a stream.
    """
    streams = [r for r in configured if issubclass(r, SSEEventRenderer)]
    pages = [r for r in configured if issubclass(r, BrowsableAPIEventStreamRenderer)]
    if not streams and not pages and any(issubclass(r, BrowsableAPIRenderer) for r in configured):
        pages = [BrowsableAPIEventStreamRenderer]
    return [*(streams or [SSEEventRenderer]), *pages]


class EventsView(APIView):
    """Events of channels, as they are sent.

    The channels are those of the view, or else those in the query: ?channels=news,sport
    """

    #: The channels to stream. If empty, ``?channels=`` names them, or else the channel manager
    #: takes them from the URL and ``?channel=``.
    channels: Sequence[str] = ()
    #: The types that the page shows. If empty, ``?messages_types=`` names them, or else it is
    #: ``message``. Streams carry all types.
    messages_types: Sequence[str] = ()
    renderer_classes: Sequence[type[BaseRenderer]] = _renderers(
        api_settings.DEFAULT_RENDERER_CLASSES
    )
    # Without this, generators of OpenAPI schemas guess what a stream is, and warn.
    schema: ViewInspector | None = None

    @method_decorator(never_cached)
    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        # Browsers send a preflight without credentials, so none can be demanded.
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return cors.preflight(request)
        return super().dispatch(request, *args, **kwargs)

    def get(self, request: Request, *args: Any, **kwargs: Any) -> HttpResponseBase:
        return self._stream(request, self.channels, views.link_anywhere)

    def _stream(
        self, request: Request, channels: Sequence[str], link_to: endpoint.LinkTo
    ) -> HttpResponseBase:
        if "channels" in request.query_params and not _NAMING.isdisjoint(self.kwargs):
            raise ParseError("The channels of this URL are fixed. Remove ?channels= from it.")
        channels = _one_of(request, "channels", channels)
        types = _one_of(request, "messages_types", self.messages_types)
        view_kwargs = {**self.kwargs, "channels": channels} if channels else self.kwargs
        if isinstance(request.accepted_renderer, SSEEventRenderer):
            return endpoint.open_stream(request._request, view_kwargs, link_to)
        names = get_channelmanager().get_channels_for_request(request._request, view_kwargs)
        return Response(StreamDescription(channels=[*names], messages_types=types or ["message"]))


class EventsViewSet(ViewSetMixin, EventsView):
    """Events of channels, as they are sent.

    The channels are those of the view set, or else those in the URL: /news/ or
    ?channels=news,sport
    """

    @method_decorator(never_cached)
    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        # The proxy's own request. It has no credentials, so DRF's policies do not apply to it. Its
        # token was signed for a request that they allowed.
        if self.action_map.get("get") == "next_link" and request.method in ("GET", "HEAD"):
            next_link: Any = self.next_link  # a bound method, which its type does not show
            response: HttpResponseBase = next_link(request, **kwargs)
            return response
        return super().dispatch(request, *args, **kwargs)

    def list(self, request: Request, format: Any = None, **mount: Any) -> HttpResponseBase:
        return self._stream(request, self.channels, partial(self._link_to, mount))

    @action(detail=False, url_path="(?P<channel>[^/]+)")
    def channel(
        self, request: Request, channel: str, format: Any = None, **mount: Any
    ) -> HttpResponseBase:
        if self.channels or "channels" in self.kwargs:
            raise ParseError("The channels of this URL are fixed. Remove its last part.")
        return self._stream(request, [channel], partial(self._link_to, mount))

    @action(detail=False, url_path="next/(?P<token>[^/]+)", url_name="next-link", schema=None)
    def next_link(
        self, request: HttpRequest, token: str, format: Any = None, **mount: Any
    ) -> HttpResponseBase:
        return endpoint.continue_stream(request, token, partial(self._link_to, mount))

    def get_extra_action_url_map(self) -> dict[str, str]:
        return {}  # the page cannot link to actions that need a channel or a token

    def _link_to(self, mount: Mapping[str, Any], token: str) -> str:
        try:
            # Without the request, for a path that has no part of its query.
            return self.reverse_action("next-link", kwargs={**mount, "token": token}, request=None)
        except NoReverseMatch:  # not mounted by a router
            return views.link_anywhere(token)


def configure_events_view_set(
    channels: Sequence[str] | None = None, messages_types: Sequence[str] | None = None
) -> type[EventsViewSet]:
    """Create an `EventsViewSet` with these channels, whose page shows these types of events."""
    attributes = {"channels": channels or (), "messages_types": messages_types or ()}
    return type("EventsViewSet", (EventsViewSet,), {"__doc__": EventsViewSet.__doc__, **attributes})


def _one_of(request: Request, name: str, configured: Sequence[str]) -> list[str]:
    """The values that the view configures, or else those in the query."""
    if isinstance(configured, str):  # a sequence as well, of its characters
        raise ImproperlyConfigured(
            f"{name} of a view of events must be a list, such as [{configured!r}]."
        )
    texts = request.query_params.getlist(name)
    asked = [item for text in texts for item in text.split(",") if item]
    if configured and asked:
        raise ParseError(f"The {name} of this URL are fixed. Remove ?{name}= from it.")
    return list(configured) or asked
