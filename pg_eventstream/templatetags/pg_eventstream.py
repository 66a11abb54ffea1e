"""``{% load pg_eventstream %}``: gives a page the id from which its stream begins."""

from __future__ import annotations

from collections.abc import Iterable

from django import template

from ..events import get_current_event_id as current_id

register = template.Library()


@register.simple_tag
def get_current_event_id(*channels: str | Iterable[str]) -> str:
    """The id of the newest event of the channels, which are names or lists of names.

    Use it in the page as the ``lastEventId`` of the stream, before the state that the page shows.
    """
    names: list[str] = []
    for channel in channels:
        names += [channel] if isinstance(channel, str) else channel
    return current_id(names)
