"""Keeps the endpoint's responses out of all caches, including Django's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.core.exceptions import BadRequest, PermissionDenied, SuspiciousOperation
from django.core.handlers.exception import response_for_exception
from django.db import connections
from django.http import Http404, HttpRequest, HttpResponseBase

# A response is for this user and this moment. "no-transform", because compression delays events;
# "private" for caches that ignore the rest, such as Django's middleware before 5.2.9.
_NEVER = "private, no-cache, no-store, no-transform"

View = Callable[..., HttpResponseBase]


def never_cached(view: View) -> View:
    """Make a view's responses uncacheable, including those to exceptions that refuse a request.

    A cache may store a 404 without an explicit lifetime (RFC 9111, 4.2.2).
    """

    @wraps(view)
    def wrapped(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        try:
            response = view(request, *args, **kwargs)
        except (Http404, PermissionDenied, BadRequest, SuspiciousOperation) as e:
            for connection in connections.all(initialized_only=True):
                if connection.settings_dict["ATOMIC_REQUESTS"] and connection.in_atomic_block:
                    connection.set_rollback(True)
            response = response_for_exception(request, e)
        response["Cache-Control"] = _NEVER
        return response

    return wrapped
