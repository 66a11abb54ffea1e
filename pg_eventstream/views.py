"""The views, and the links by which the proxy finds them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponseBase
from django.urls import NoReverseMatch, URLResolver, get_resolver, get_urlconf, reverse
from django.utils.http import escape_leading_slashes
from django.views.decorators.http import require_http_methods, require_safe

from . import cors
from .caching import never_cached
from .endpoint import LinkTo, continue_stream, open_stream
from .grip import links

__all__ = ["events"]

#: The names of the URL patterns.
EVENTS_URL = "pg_eventstream-events"
NEXT_LINK_URL = "pg_eventstream-next"


@never_cached
@require_http_methods(["GET", "HEAD", "OPTIONS"])
def events(request: HttpRequest, **kwargs: Any) -> HttpResponseBase:
    """Open a stream, or resume one with Last-Event-ID.

    Mounted by `pg_eventstream.urls`, or called by a view of your own with the channels:
    ``return events(request, channels=["room-1"])``. The latter wants `pg_eventstream.urls`
    somewhere in the URLconf too: the proxy asks there how the stream goes on.
    """
    if request.method == "OPTIONS":
        return cors.preflight(request)
    return open_stream(request, kwargs, link_to=_links_of(request))


@login_not_required  # The proxy has no session: the token stands for the stream's user.
@never_cached
@require_safe
def next_link(request: HttpRequest, token: str, **kwargs: Any) -> HttpResponseBase:
    """Tell the proxy how a stream goes on. Ends it if the user may not read it any more."""
    base = _path(request).removesuffix(f"{links.NEXT}{token}")
    return continue_stream(request, token, link_to=_links_below(base))


def _links_of(request: HttpRequest) -> LinkTo:
    if request.resolver_match and request.resolver_match.url_name == EVENTS_URL:
        return _links_below(_path(request))
    # Called by another view, whose path may have nothing below it.
    return link_anywhere


def _path(request: HttpRequest) -> str:
    """The path with the script name, as clients and reverse() know it.

    ``request.path`` lacks the script name under ASGI if something on the way has taken it off.
    """
    return f"{request.META.get('SCRIPT_NAME', '').rstrip('/')}{request.path_info}"


def link_anywhere(token: str) -> str:
    """A link below any path at which the endpoint is mounted, in whatever namespace."""
    names = _next_link_names(get_resolver(get_urlconf()))
    for name in names:
        with suppress(NoReverseMatch):
            return reverse(name, kwargs={"token": token})
    include = 'path("events/", include("pg_eventstream.urls"))'
    what_to_do = f"add {include} to the URLconf."
    if names:
        what_to_do = (
            "the URLconf includes pg_eventstream.urls only at paths with parameters, such as"
            " rooms/<room>/, whose values nobody knows here. Include it at one without any, too:"
            f" {include}."
        )
    raise ImproperlyConfigured(
        "A view of your own streams events, so the proxy needs an address to ask how its streams"
        f" go on: {what_to_do}"
    )


@lru_cache(maxsize=8)
def _next_link_names(urlconf: URLResolver) -> tuple[str, ...]:
    """What `next_link` is called, with its namespaces. A project may have thousands of patterns."""
    return tuple(_walk_to_next_links(urlconf))


def _walk_to_next_links(resolver: URLResolver, namespace: str = "") -> Iterator[str]:
    for pattern in resolver.url_patterns:
        if isinstance(pattern, URLResolver):
            below = f"{namespace}{pattern.namespace}:" if pattern.namespace else namespace
            yield from _walk_to_next_links(pattern, below)
        elif pattern.name == NEXT_LINK_URL:
            yield f"{namespace}{NEXT_LINK_URL}"


def _links_below(base: str) -> LinkTo:
    """Links below the path at which the endpoint is mounted."""
    # As it stands in a URL and in a header. A path that began with two slashes would name a
    # host, to which the proxy would turn.
    quoted = escape_leading_slashes(quote(base))
    return lambda token: f"{quoted}{links.NEXT}{token}"
