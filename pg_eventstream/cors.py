"""Lets pages of other origins read streams, according to the EVENTSTREAM_ALLOW_* settings.

The request's Origin header decides. Without these settings no header is added, so that a
middleware such as django-cors-headers can do it instead.
"""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.utils.cache import patch_vary_headers

from .conf import conf

_METHODS = "GET, HEAD"
# Headers of libraries that read streams with fetch(). EventSource sends its own without asking.
_HEADERS = ("Last-Event-ID", "Cache-Control")
# The limit of Chromium. Browsers with a lower limit use theirs.
_MAX_AGE_SECONDS = 7200


def add_headers(request: HttpRequest, response: HttpResponseBase) -> None:
    """Tell the browser whether the requesting page may read the response.

    Only origins that are listed may send credentials. Browsers send none for "*", and to echo any
    origin would let every page read what its visitor is allowed to read.
    """
    if _allow_origin(request, response) and request.method == "OPTIONS":
        response["Access-Control-Allow-Methods"] = _METHODS
        response["Access-Control-Allow-Headers"] = ", ".join([*_HEADERS, *conf.allow_headers])
        response["Access-Control-Max-Age"] = str(_MAX_AGE_SECONDS)


def preflight(request: HttpRequest) -> HttpResponse:
    """The response to OPTIONS, which browsers send before some requests of a page."""
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
    # A cache must not serve this response to another origin or to a request without one.
    patch_vary_headers(response, ["Origin"])
    origin = request.headers.get("Origin", "")
    if origin.lower() not in allowed:
        return False
    response["Access-Control-Allow-Origin"] = origin
    if conf.allow_credentials:
        response["Access-Control-Allow-Credentials"] = "true"
    return True
