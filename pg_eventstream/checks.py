"""System checks: a wrong setting is reported at start, with what to do about it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register
from django.db import connections
from django.utils.module_loading import import_string

from .channelmanager import ChannelManagerBase
from .conf import MOST_CHANNELS, conf

_MIDDLEWARE = "django_grip.GripMiddleware"


@register
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    return [
        *_check_database(),
        *_check_numbers(),
        *_check_channelmanager(),
        *_check_grip(),
    ]


def _check_database() -> list[CheckMessage]:
    alias = conf.database
    if alias not in connections:
        return [
            Error(
                f"EVENTSTREAM_DATABASE names {alias!r}, which is not in DATABASES.",
                hint=f"Use one of: {', '.join(connections)}.",
                id="pg_eventstream.E001",
            )
        ]
    if connections[alias].vendor != "postgresql":
        return [
            Error(
                f"The database {alias!r} is not PostgreSQL, so it cannot hold the events.",
                hint="Name a PostgreSQL database in EVENTSTREAM_DATABASE.",
                id="pg_eventstream.E002",
            )
        ]
    return []


def _check_numbers() -> list[CheckMessage]:
    messages: list[CheckMessage] = []
    retention = getattr(settings, "EVENTSTREAM_RETENTION", timedelta(hours=24))
    if not _is_number(retention) and not isinstance(retention, timedelta):
        messages.append(
            Error(
                "EVENTSTREAM_RETENTION must be a timedelta, or a number of seconds.",
                hint="For a day, which is the default: timedelta(hours=24).",
                id="pg_eventstream.E003",
            )
        )
    elif not 0 < _seconds(retention) < timedelta.max.total_seconds():
        messages.append(
            Error(
                "EVENTSTREAM_RETENTION must be longer than nothing.",
                hint="Clients that lose their connection resume from the events that are kept.",
                id="pg_eventstream.E003",
            )
        )
    limit = getattr(settings, "EVENTSTREAM_CHANNEL_LIMIT", 10)
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MOST_CHANNELS:
        messages.append(
            Error(
                f"EVENTSTREAM_CHANNEL_LIMIT must be a number from 1 to {MOST_CHANNELS}.",
                hint="A GRIP proxy cuts further channels of a connection off without a word.",
                id="pg_eventstream.E004",
            )
        )
    timeout = getattr(settings, "EVENTSTREAM_NEXT_LINK_TIMEOUT", 600)
    if not isinstance(timeout, int) or timeout < 5:
        messages.append(
            Error(
                "EVENTSTREAM_NEXT_LINK_TIMEOUT must be a number of seconds, at least 5.",
                hint="Every quiet stream asks the origin once in that time.",
                id="pg_eventstream.E005",
            )
        )
    poll = getattr(settings, "EVENTSTREAM_SAFETY_POLL", 5.0)
    if poll is not None and (not _is_number(poll) or poll <= 0):
        messages.append(
            Error(
                "EVENTSTREAM_SAFETY_POLL must be a positive number of seconds, or None for none.",
                hint="The default, 5, is how long an event waits at most if its ring is lost.",
                id="pg_eventstream.E006",
            )
        )
    return messages


def _check_channelmanager() -> list[CheckMessage]:
    path = conf.channelmanager_class
    try:
        manager = import_string(path)
    except ImportError as e:
        problem = f"cannot be imported: {e}"
    else:
        if isinstance(manager, type) and issubclass(manager, ChannelManagerBase):
            return []
        problem = "is not a subclass of ChannelManagerBase"
    return [
        Error(
            f"EVENTSTREAM_CHANNELMANAGER_CLASS {path!r} {problem}.",
            hint="Name a subclass of pg_eventstream.channelmanager.DefaultChannelManager.",
            id="pg_eventstream.E007",
        )
    ]


def _check_grip() -> list[CheckMessage]:
    messages: list[CheckMessage] = []
    for entry in conf.grip_proxies:
        if "control_uri" not in entry:
            messages.append(
                Error(
                    "An entry of GRIP_PROXIES has no control_uri.",
                    hint="Events are published over HTTP; ZeroMQ addresses are not used.",
                    id="pg_eventstream.E008",
                )
            )
        elif not str(entry["control_uri"]).startswith(("http://", "https://")):
            messages.append(
                Error(
                    f"The proxy address {entry['control_uri']!r} is not an HTTP address.",
                    hint='For Pushpin on the same machine: GRIP_URL = "http://localhost:5561".',
                    id="pg_eventstream.E008",
                )
            )
        elif "key" not in entry and "verify_key" not in entry:
            messages.append(
                Warning(
                    f"No key is configured for the proxy {entry['control_uri']}, so anybody who"
                    " can reach the application directly can pose as the proxy.",
                    hint="Set sig_key in pushpin.conf, and the same key in GRIP_URL:"
                    ' "http://localhost:5561?key=…".',
                    id="pg_eventstream.W001",
                )
            )
    if conf.grip_proxies and _MIDDLEWARE not in settings.MIDDLEWARE:
        messages.append(
            Error(
                "Streams need django-grip's middleware to talk to the proxy.",
                hint=f'Add "{_MIDDLEWARE}" to MIDDLEWARE, as its first entry.',
                id="pg_eventstream.E009",
            )
        )
    return messages


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _seconds(value: timedelta | float) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else value
