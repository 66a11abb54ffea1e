"""Renderers for Django REST Framework: an event stream, or a page that shows one.

The page extends a template of ``rest_framework``, which must be in INSTALLED_APPS for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder
from django.utils.text import slugify
from rest_framework.renderers import BaseRenderer, BrowsableAPIRenderer
from rest_framework.settings import api_settings
from rest_framework.utils.urls import remove_query_param

from . import endpoint, sse
from .conf import conf

__all__ = ["BrowsableAPIEventStreamRenderer", "SSEEventRenderer"]


class StreamDescription(dict[str, list[str]]):
    """The ``channels`` of a view and the ``messages_types`` that its page shows."""


class SSEEventRenderer(BaseRenderer):
    """Lets a view answer ``Accept: text/event-stream``.

    Streams themselves are not rendered. A refusal becomes a ``stream-error`` whose condition is the
    status (``forbidden``, ``too-many-requests``). Any other data becomes a ``message``.
    """

    media_type = sse.MEDIA_TYPE  # as clients send it, mostly without a charset
    format = sse.MEDIA_TYPE
    charset = "utf-8"

    def render(
        self,
        data: Any,
        accepted_media_type: str | None = None,
        renderer_context: Mapping[str, Any] | None = None,
    ) -> bytes:
        if data is None:
            return b""
        response = (renderer_context or {}).get("response")
        if response is not None and response.status_code >= 400:
            text = data.get("detail", data) if isinstance(data, Mapping) else data
            return sse.encode_error(slugify(response.status_text), str(text)).encode()
        return sse.encode_event("message", json.dumps(data, cls=DjangoJSONEncoder)).encode()


class BrowsableAPIEventStreamRenderer(BrowsableAPIRenderer):
    """The browsable API. Its page for a stream shows the events as they arrive."""

    format = "api_sse"
    template = "pg_eventstream/browsable_api.html"

    def get_content(
        self,
        renderer: Any,
        data: Any,
        accepted_media_type: str | None,
        renderer_context: Mapping[str, Any],
    ) -> str:
        if isinstance(data, StreamDescription):
            return ""  # the page shows the events instead
        return super().get_content(renderer, data, accepted_media_type, renderer_context)

    def get_context(
        self, data: Any, accepted_media_type: str | None, renderer_context: Mapping[str, Any]
    ) -> dict[str, Any]:
        context = super().get_context(data, accepted_media_type, renderer_context)
        if isinstance(data, StreamDescription):
            # The same URL, as an EventSource requests it.
            address = renderer_context["request"].get_full_path()
            url = remove_query_param(address, api_settings.URL_FORMAT_OVERRIDE)
            context["stream"] = {
                "url": url,
                "arrives": endpoint.can_stream(renderer_context["request"]._request),
                "has_proxy": bool(conf.grip_proxies) or endpoint.needs_proxy(),
                **data,
            }
        return context
