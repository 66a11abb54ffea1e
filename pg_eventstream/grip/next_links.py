"""What happens to a next link on its way to our view, before Django has found the view.

A next link has the script name in front, as `django.urls.reverse` makes addresses: a proxy that
takes this prefix off gets a link that it can take it off. Where the prefix was taken off before the
proxy, it comes back here with the prefix. Django removes it under ASGI, but not under WSGI.

And if something else answers in place of our view (a redirect to a login page, a 404), the proxy
tries again for half a minute and gives the stream up; here it is noticed and logged.
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
_LONG = re.compile(r"[\w.:-]{40,}")  # a token, or what is left of it: not for the log


@dataclass(slots=True)
class _Question:
    """A request of the proxy for a next link."""

    path: str
    signature: str
    #: Whether the path ends in a token of ours; if not, it may be another application's link.
    has_token: bool
    arrived: bool = False


class _Present(threading.local):
    """The question of this thread's request.

    Django sends both signals of a request on one thread, under ASGI too.
    """

    question: _Question | None = None


_present = _Present()
_KEY = "pg_eventstream.next_link"


def expect(environ: Any = None, scope: Any = None, **kwargs: Any) -> None:
    """A request begins (`django.core.signals.request_started`)."""
    _present.question = None
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
    _present.question = question = _Question(path, _header("Grip-Sig", environ, scope), has_token)
    (environ if scope is None else scope)[_KEY] = question


def arrived(request: HttpRequest) -> None:
    """Our view has the request, so the answer is ours."""
    question = getattr(request, "scope", request.META).get(_KEY)
    if question is not None:
        question.arrived = True


def report(**kwargs: Any) -> None:
    """A request is over (`django.core.signals.request_finished`)."""
    question, _present.question = _present.question, None
    if question is None or question.arrived or not is_verified(question.signature):
        return
    try:
        view = resolve(question.path).view_name
    except Resolver404:
        if _rarely("no view"):
            logger.error(
                "The proxy asks how its streams go on, but no URL pattern matches %r, so they"
                " end within a minute. Something on the way changes the path that clients ask for."
                " If it takes a prefix off, name the prefix in FORCE_SCRIPT_NAME. It must not"
                " replace one by another.",
                _LONG.sub("…", question.path),
            )
        return
    if question.has_token and _rarely("another answer"):
        logger.error(
            "The proxy asks how its streams go on, but something else answers than the view %r, so"
            " they end within a minute. A middleware or a decorator redirects or refuses what has"
            " no cookies, or has come over HTTP. It must let these requests through: their"
            " resolver_match.url_name is %r, and their token authenticates them. If it is"
            " SECURE_SSL_REDIRECT, set SECURE_REDIRECT_EXEMPT = [r%r].",
            view,
            view.rpartition(":")[2],
            EXEMPT,
        )


#: For SECURE_REDIRECT_EXEMPT: the paths of next links, those of view sets too.
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
