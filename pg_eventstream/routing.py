"""Routes for an ``asgi.py`` with Channels: ``URLRouter(pg_eventstream.routing.urlpatterns)``.

This is the setup of django-eventstream 2.1 to 4.5. `pg_eventstream.urls` in the URLconf does the
same without Channels. This module does not import Channels.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from typing import Any

from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest
from django.urls import ResolverMatch, path

__all__ = ["urlpatterns"]

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class _Handler(ASGIHandler):
    """Django with its middleware, and with `views.events` for every path.

    The outer routes name the channels, by ``channels``, ``format-channels`` or ``channel`` as in a
    URLconf. If a middleware has put a user into the scope (AuthMiddlewareStack, or one that reads
    tokens), the stream is that user's, as with django-eventstream. The scope's session becomes the
    request's if MIDDLEWARE provides none.
    """

    def resolve_request(self, request: HttpRequest) -> ResolverMatch:
        from .views import events

        scope: Scope = request.scope  # type: ignore[attr-defined]
        if "user" in scope:
            request.user = scope["user"]
        if "session" in scope and not hasattr(request, "session"):
            request.session = scope["session"]
        kwargs = scope.get("url_route", {}).get("kwargs", {})
        request.resolver_match = ResolverMatch(events, (), kwargs)
        return request.resolver_match


@cache
def _handler() -> _Handler:
    # Not at import: an asgi.py may import `urlpatterns` before it calls get_asgi_application().
    return _Handler()


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    """The endpoint as an ASGI application."""
    await _handler()(scope, receive, send)


urlpatterns = [path("", stream)]  # type: ignore[arg-type]
