"""The views, and the links by which the proxy continues their streams."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from django.contrib.auth.decorators import login_not_required
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.urls import NoReverseMatch, URLResolver, get_resolver, get_urlconf, reverse
from django.utils.crypto import constant_time_compare
from django.utils.http import escape_leading_slashes
from django.views.decorators.http import require_http_methods, require_safe

from . import cors
from .caching import never_cached
from .conf import conf
from .endpoint import LinkTo, continue_stream, open_stream
from .grip import links

__all__ = ["events", "metrics"]

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

#: The names of the URL patterns.
EVENTS_URL = "pg_eventstream-events"
NEXT_LINK_URL = "pg_eventstream-next"


@never_cached
@require_http_methods(["GET", "HEAD", "OPTIONS"])
def events(request: HttpRequest, **kwargs: Any) -> HttpResponseBase:
    """Open a stream, or resume one with Last-Event-ID.

    `pg_eventstream.urls` mounts this view. Your own view can call it with the channels:
    ``return events(request, channels=["room-1"])``. The URLconf must then include
    `pg_eventstream.urls` as well, because there the proxy asks how to continue the stream.
    """
    if request.method == "OPTIONS":
        return cors.preflight(request)
    return open_stream(request, kwargs, link_to=_links_of(request))


@login_not_required  # It decides itself: see below.
@never_cached
@require_safe
def metrics(request: HttpRequest) -> HttpResponseBase:
    """The state of the event stream as gauges for Prometheus. Needs the extra ``metrics``.

    Only for requests with ``Authorization: Bearer`` and ``EVENTSTREAM_METRICS_TOKEN``, and for
    users with the permission ``pg_eventstream.view_event``.
    """
    if not _may_see_metrics(request):
        user = getattr(request, "user", None)
        if conf.metrics_token is None or (user is not None and user.is_authenticated):
            return HttpResponse(_NO_METRICS, status=403, content_type="text/plain")
        response = HttpResponse(_NO_METRICS, status=401, content_type="text/plain")
        response["WWW-Authenticate"] = 'Bearer realm="metrics"'
        return response
    try:
        from .operate.prometheus.metrics import encode
    except ImportError:
        text = "prometheus-client is not installed: pip install 'pg-eventstream[metrics]'\n"
        return HttpResponse(text, status=501, content_type="text/plain")
    body, content_type = encode(_metrics_registry(), request.headers.get("Accept", ""))
    return HttpResponse(body, content_type=content_type)


_NO_METRICS = (
    "Send EVENTSTREAM_METRICS_TOKEN as a bearer token, or log in as a user with the permission"
    " pg_eventstream.view_event.\n"
)


def _may_see_metrics(request: HttpRequest) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    token = conf.metrics_token
    if token is not None and scheme.lower() == "bearer":
        return constant_time_compare(given.strip(), token)
    user = getattr(request, "user", None)
    return bool(
        user is not None and user.is_authenticated and user.has_perm("pg_eventstream.view_event")
    )


@lru_cache(maxsize=1)
def _metrics_registry() -> CollectorRegistry:
    """One for all requests, so that those at the same time cause one read."""
    from .operate.prometheus.metrics import latest_state, registry

    return registry(latest_state(), with_counters=False)


os.register_at_fork(after_in_child=_metrics_registry.cache_clear)  # its lock could be taken


@login_not_required  # The proxy has no session: the token stands for the stream's user.
@never_cached
@require_safe
def next_link(request: HttpRequest, token: str, **kwargs: Any) -> HttpResponseBase:
    """Tell the proxy how a stream continues. Ends it if the user may no longer read it."""
    base = _path(request).removesuffix(f"{links.NEXT}{token}")
    return continue_stream(request, token, link_to=_links_below(base))


def _links_of(request: HttpRequest) -> LinkTo:
    if request.resolver_match and request.resolver_match.url_name == EVENTS_URL:
        return _links_below(_path(request))
    # Called by another view, at whose path nothing can be mounted.
    return link_anywhere


def _path(request: HttpRequest) -> str:
    """The path with the script name, as clients and reverse() use it.

    Under ASGI, ``request.path`` lacks the script name if a proxy has removed it.
    """
    return f"{request.META.get('SCRIPT_NAME', '').rstrip('/')}{request.path_info}"


def link_anywhere(token: str) -> str:
    """A link below any path at which the endpoint is mounted, in any namespace."""
    names = _next_link_names(get_resolver(get_urlconf()))
    for name in names:
        with suppress(NoReverseMatch):
            return reverse(name, kwargs={"token": token})
    include = 'path("events/", include("pg_eventstream.urls"))'
    remedy = f"Add {include} to the URLconf."
    if names:
        remedy = (
            "The URLconf includes pg_eventstream.urls only at paths with parameters, such as"
            " rooms/<room>/, whose values are not known here. Include it at a path without any as"
            f" well: {include}."
        )
    raise ImproperlyConfigured(
        "Your own view streams events, and the proxy needs a URL to ask how its streams continue."
        f" {remedy}"
    )


@lru_cache(maxsize=8)
def _next_link_names(urlconf: URLResolver) -> tuple[str, ...]:
    """The names of `next_link` with their namespaces. Cached for projects with many patterns."""
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
    # Quoted for a URL and a header. A path that began with two slashes would name a host, which
    # the proxy would ask.
    quoted = escape_leading_slashes(quote(base))
    return lambda token: f"{quoted}{links.NEXT}{token}"
