"""``{% load pg_eventstream %}``: what a page needs to begin its stream."""

from __future__ import annotations

from collections.abc import Iterable

from django import template

from ..events import get_current_event_id as current_id

register = template.Library()


@register.simple_tag
def get_current_event_id(*channels: str | Iterable[str]) -> str:
    """The id of the newest event of the channels: names, or lists of names.

    It stands in the page as ``lastEventId`` of the stream, before the state that it shows.
    """
    names: list[str] = []
    for channel in channels:
        names += [channel] if isinstance(channel, str) else channel
    return current_id(names)
