"""Lets pages of other origins read streams, as the EVENTSTREAM_ALLOW_* settings say.

Judged by the request's Origin. Without these settings nothing is added, so that a middleware
such as django-cors-headers can do it instead.
"""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.utils.cache import patch_vary_headers

from .conf import conf

_METHODS = "GET, HEAD"
# What libraries that read streams with fetch() send; EventSource itself needs no leave for its.
_HEADERS = ("Last-Event-ID", "Cache-Control")
# Browsers keep an answer for less if this is too long for them; Chromium's limit.
_MAX_AGE_SECONDS = 7200


def add_headers(request: HttpRequest, response: HttpResponseBase) -> None:
    """Tell the browser whether the page that asks may read the response.

    Credentials are allowed to origins that are named only: a browser takes none for "*", and
    to repeat whatever origin asks would let any page read as the user that visits it.
    """
    if _allow_origin(request, response) and request.method == "OPTIONS":
        response["Access-Control-Allow-Methods"] = _METHODS
        response["Access-Control-Allow-Headers"] = ", ".join([*_HEADERS, *conf.allow_headers])
        response["Access-Control-Max-Age"] = str(_MAX_AGE_SECONDS)


def preflight(request: HttpRequest) -> HttpResponse:
    """The answer to OPTIONS: what a browser asks before a page's request, if it has to."""
    response = HttpResponse(status=204, headers={"Allow": f"{_METHODS}, OPTIONS"})
    add_headers(request, response)
    return response


def _allow_origin(request: HttpRequest, response: HttpResponseBase) -> bool:
    allowed = conf.allow_origins
    if "*" in allowed:
        response["Access-Control-Allow-Origin"] = "*"
        return True
    if not allowed:
        return False
    # A cache must not give one origin the answer to another, nor to a request without any.
    patch_vary_headers(response, ["Origin"])
    origin = request.headers.get("Origin", "")
    if origin.lower() not in allowed:
        return False
    response["Access-Control-Allow-Origin"] = origin
    if conf.allow_credentials:
        response["Access-Control-Allow-Credentials"] = "true"
    return True
