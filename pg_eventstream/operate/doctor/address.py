"""Finds the URL at which clients open streams, from the URLconf and the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from django.core.exceptions import ImproperlyConfigured
from django.urls import NoReverseMatch, URLResolver, get_resolver, reverse
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from ...conf import conf

#: The default ports of Pushpin and of ``manage.py runserver``.
PUSHPIN_PORT, RUNSERVER_PORT = 7999, 8000


def find_url(view: Callable[..., Any]) -> tuple[str, str]:
    """A URL of the endpoint, and a remark on it. ``view`` is the view that opens streams.

    Raises `ImproperlyConfigured` if the URLconf has no path of the view without parameters.
    """
    path = _find_path(view)
    proxies = conf.grip_proxies
    if not proxies:
        return (
            f"http://127.0.0.1:{RUNSERVER_PORT}{path}",
            " (path of the URLconf, address of manage.py runserver; else: --through URL)",
        )
    host = urlsplit(str(proxies[0].get("control_uri"))).hostname or "localhost"
    return (
        f"http://{f'[{host}]' if ':' in host else host}:{PUSHPIN_PORT}{path}",
        " (path of the URLconf, host of GRIP_URL, usual port; else: --through URL)",
    )


def _find_path(view: Callable[..., Any]) -> str:
    for name in _names(get_resolver(), view):
        with suppress(NoReverseMatch):
            return reverse(name)
    raise ImproperlyConfigured(
        "The URLconf mounts the endpoint at no path without parameters. Give the URL at which"
        " clients open streams: --through https://example.com/events/"
    )


def _names(resolver: URLResolver, view: Callable[..., Any], namespace: str = "") -> Iterator[str]:
    """The names of the view with their namespaces."""
    for pattern in resolver.url_patterns:
        if isinstance(pattern, URLResolver):
            below = f"{namespace}{pattern.namespace}:" if pattern.namespace else namespace
            yield from _names(pattern, view, below)
        elif pattern.callback is view and pattern.name:
            yield f"{namespace}{pattern.name}"


def check_url(url: str) -> str:
    """Return the URL if a client can request it; else raise `ImproperlyConfigured`."""
    with suppress(LocationParseError):
        parsed = parse_url(url)
        if parsed.scheme in ("http", "https") and parsed.host:
            return url
    raise ImproperlyConfigured(
        f"{url!r} is not a URL of an endpoint. Give the full URL:"
        " --through https://example.com/events/"
    )
