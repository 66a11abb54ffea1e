"""Handles requests for next links before Django has found their view.

A next link begins with the script name, as all URLs of `django.urls.reverse` do: a proxy that
removes this prefix gets a link from which it can remove it. If the prefix was removed before the
proxy, its request arrives here with the prefix. Django removes it under ASGI, but not under WSGI.

If another component answers instead of the view (by a redirect to a login page, or a 404), the
proxy retries for half a minute and then drops the stream. That is detected and logged here.
"""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass
from typing import Any

from django.core.handlers.asgi import get_script_prefix
from django.core.handlers.wsgi import get_path_info, get_script_name
from django.http import HttpRequest
from django.urls import Resolver404, resolve

from ..conf import conf
from ..errors import InvalidRequest
from ..rarely import Rarely
from . import links
from .names import events_channel
from .signature import is_verified

logger = logging.getLogger("pg_eventstream.next_links")

_rarely = Rarely()
_LONG = re.compile(r"[\w.:-]{40,}")  # a token or a part of it, which must not be logged


@dataclass(slots=True)
class _LinkRequest:
    """A request of the proxy for a next link."""

    path: str
    signature: str
    #: Whether the path ends in a valid token. If not, it could be another application's link.
    has_token: bool
    arrived: bool = False


class _Current(threading.local):
    """The link request of this thread.

    Django sends both signals of a request on one thread, also under ASGI.
    """

    request: _LinkRequest | None = None


_current = _Current()
_KEY = "pg_eventstream.next_link"


def expect(environ: Any = None, scope: Any = None, **kwargs: Any) -> None:
    """Note a request for a next link. A receiver of `django.core.signals.request_started`."""
    _current.request = None
    if environ is None and scope is None:
        return
    if scope is None:
        script_name, path = get_script_name(environ).rstrip("/"), get_path_info(environ)
    else:
        script_name = get_script_prefix(scope).rstrip("/")
        path = scope["path"].removeprefix(script_name)
    last = _header("Grip-Last", environ, scope)
    has_token = "next" in path and _ends_in_token(path)
    if not has_token and f"{conf.grip_prefix}{events_channel('')}" not in last:
        return
    if has_token and script_name and path.startswith(f"{script_name}/"):
        path = path.removeprefix(script_name)
        if scope is None:
            environ["PATH_INFO"] = path.encode().decode("latin-1")
        else:
            scope["path"] = f"{script_name}{path}"
    _current.request = _LinkRequest(path, _header("Grip-Sig", environ, scope), has_token)
    (environ if scope is None else scope)[_KEY] = _current.request


def mark_arrived(request: HttpRequest) -> None:
    """Note that the request has reached the view."""
    link_request = getattr(request, "scope", request.META).get(_KEY)
    if link_request is not None:
        link_request.arrived = True


def report(**kwargs: Any) -> None:
    """Log a request that did not reach the view. A receiver of request_finished."""
    request, _current.request = _current.request, None
    if request is None or request.arrived or not is_verified(request.signature):
        return
    try:
        view = resolve(request.path).view_name
    except Resolver404:
        if _rarely("no view"):
            logger.error(
                "The proxy asks how to continue its streams, but no URL pattern matches %r, so they"
                " end within a minute. A component between them changes the path that clients"
                " request. If it removes a prefix, set FORCE_SCRIPT_NAME to the prefix. It must not"
                " replace one prefix by another.",
                _LONG.sub("…", request.path),
                extra={"event": "next-link-not-matched"},
            )
        return
    if request.has_token and _rarely("another answer"):
        logger.error(
            "The proxy asks how to continue its streams, but the view %r does not get its request,"
            " so they end within a minute. A middleware or a decorator redirects or refuses"
            " requests that have no cookies, or that arrive over HTTP. It must let these requests"
            " through: their resolver_match.url_name is %r, and their token authenticates them. If"
            " it is SECURE_SSL_REDIRECT, set SECURE_REDIRECT_EXEMPT = [r%r].",
            view,
            view.rpartition(":")[2],
            EXEMPT,
            extra={"event": "next-link-not-reached", "view": view},
        )


#: For SECURE_REDIRECT_EXEMPT: the paths of next links, including those of view sets.
EXEMPT = r"(^|/)next[-/]"


def _ends_in_token(path: str) -> bool:
    segment = path.rstrip("/").rpartition("/")[2]
    try:
        links.unsign(segment.partition(links.NEXT)[2] or segment)
    except (InvalidRequest, UnicodeError):
        return False
    return True


def _header(name: str, environ: Any, scope: Any) -> str:
    if scope is None:
        return str(environ.get(f"HTTP_{name.upper().replace('-', '_')}", ""))
    wanted = name.lower().encode()
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == wanted), "")
