"""Middleware of sites that answer some requests themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from django.http import HttpRequest, HttpResponse, HttpResponseRedirect

# A next link that another component answers


Middleware = Callable[[HttpRequest], HttpResponse]


def only_with_a_cookie(get_response: Middleware) -> Middleware:
    """As on a site that is not public yet."""

    def middleware(request: HttpRequest) -> HttpResponse:
        return get_response(request) if request.COOKIES else HttpResponseRedirect("/login/")

    return middleware


def under_maintenance(get_response: Middleware) -> Middleware:
    return lambda request: HttpResponse("We are back soon.", status=503)


def only_links_without_a_cookie(get_response: Middleware) -> Middleware:
    """As in the documentation."""

    class OnlyLinks:
        def __call__(self, request: HttpRequest) -> HttpResponse:
            return get_response(request)

        def process_view(self, request: HttpRequest, *args: Any) -> HttpResponse | None:
            assert request.resolver_match
            if request.resolver_match.url_name == "pg_eventstream-next" or request.COOKIES:
                return None
            return HttpResponseRedirect("/login/")

    return OnlyLinks()


def with_a_slow_clock(get_response: Middleware) -> Middleware:
    """The clock of this process is ten minutes behind."""
    now = time.time
    time.time = lambda: now() - 600
    return get_response


def busy_at_next_links(get_response: Middleware) -> Middleware:
    """A server that is too busy, but only for the proxy's own requests."""

    def middleware(request: HttpRequest) -> HttpResponse:
        is_link = "/next-" in request.path
        return HttpResponse("Busy.", status=503) if is_link else get_response(request)

    return middleware
