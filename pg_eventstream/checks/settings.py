"""Checks of the settings: ``manage.py check``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeGuard

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.core.exceptions import ImproperlyConfigured
from django.core.management import get_commands
from django.db import DEFAULT_DB_ALIAS, connections

from ..channelmanager import HINT, load_class
from ..conf import MOST_CHANNELS, conf
from ..tables import placement
from ..tables.placement import ROUTER
from .proxies import check_proxies
from .registration import register_check

_ORIGIN = re.compile(
    r"(?!http://.*:80$)(?!https://.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d+)?"
)
_HEADER = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
_LEAST_TIMEOUT = 5
_WSGI_RUNSERVERS = ("django.core", "django.contrib.staticfiles")
_OLD_SETTINGS = (
    "EVENTSTREAM_STORAGE_CLASS",
    "EVENTSTREAM_STORAGE_CONNECTION",
    "EVENTSTREAM_REDIS",
)

#: The settings that are numbers: attribute of `conf`, hint, id of the check.
_NUMBERS = [
    (
        "retention",
        "A client that reconnects within this time gets all that it missed. The default is"
        " timedelta(hours=24).",
        "pg_eventstream.E003",
    ),
    (
        "consumer_hold",
        "Consumers hold pruning of what they have not handled, and this is where it ends. The"
        " default is timedelta(days=7).",
        "pg_eventstream.E023",
    ),
    (
        "replay_age",
        "Remove the setting to let clients begin with any event that is kept.",
        "pg_eventstream.E018",
    ),
    (
        "channel_limit",
        "The default is 10 channels per stream.",
        "pg_eventstream.E004",
    ),
    (
        "next_link_timeout",
        "Each quiet stream asks the application once in this time, by a link that expires after a"
        " day. The default is 600.",
        "pg_eventstream.E005",
    ),
    (
        "safety_poll",
        "An event whose notification is lost waits at most this long. The default is 5.",
        "pg_eventstream.E006",
    ),
    (
        "max_age",
        "A stream without a proxy ends after this time, and its client reconnects.",
        "pg_eventstream.E017",
    ),
]


@register_check()
def check_settings(**kwargs: Any) -> Iterator[CheckMessage]:
    yield from _check_events_database()
    yield from _check_routers()
    yield from _check_numbers()
    yield from _check_channel_limit()
    yield from _check_next_link_timeout()
    yield from _check_retention()
    yield from _check_channelmanager()
    yield from check_proxies()
    yield from _check_origins()
    yield from _check_headers()
    yield from _check_metrics_token()
    yield from _check_old_settings()
    yield from _check_daphne()
    yield from _check_runserver()


def _check_events_database() -> Iterator[CheckMessage]:
    try:
        _ = conf.database
    except ImproperlyConfigured as e:
        if conf.database_alias in connections:
            hint = f'To keep the tables out of other databases: DATABASE_ROUTERS = ["{ROUTER}"].'
            yield Error(str(e), hint=hint, id="pg_eventstream.E002")
        else:
            yield Error(str(e), hint="Use one of these aliases.", id="pg_eventstream.E001")


def _check_routers() -> Iterator[CheckMessage]:
    try:
        database = conf.database
    except ImproperlyConfigured:
        return
    for alias in connections:
        problem = placement.find_problem(alias)
        if problem is None:
            continue
        if alias in (database, DEFAULT_DB_ALIAS):
            yield Error(problem.message, hint=problem.hint, id="pg_eventstream.E019")
        else:  # No command migrates it unless told to, except those that create test databases.
            yield Warning(problem.message, hint=problem.hint, id="pg_eventstream.W007")


def _check_numbers() -> Iterator[CheckMessage]:
    reported: set[str] = set()
    for attribute, hint, check_id in _NUMBERS:
        try:
            getattr(conf, attribute)
        except ImproperlyConfigured as e:
            # A number can depend on another one, and then fails with the other's message.
            if str(e) not in reported:
                yield Error(str(e), hint=hint, id=check_id)
            reported.add(str(e))


def _check_channel_limit() -> Iterator[CheckMessage]:
    with suppress(ImproperlyConfigured):
        if conf.channel_limit < getattr(settings, "EVENTSTREAM_CHANNEL_LIMIT", 0):
            yield Error(
                f"EVENTSTREAM_CHANNEL_LIMIT must be a whole number from 1 to {MOST_CHANNELS}.",
                hint="A GRIP proxy holds 20 channels per connection, one of which is the user's,"
                " and silently drops the rest.",
                id="pg_eventstream.E004",
            )


def _check_next_link_timeout() -> Iterator[CheckMessage]:
    with suppress(ImproperlyConfigured):
        if conf.next_link_timeout < _LEAST_TIMEOUT:
            yield Error(
                f"EVENTSTREAM_NEXT_LINK_TIMEOUT must be at least {_LEAST_TIMEOUT} seconds.",
                hint="Each quiet stream asks the application once in this time.",
                id="pg_eventstream.E005",
            )


def _check_retention() -> Iterator[CheckMessage]:
    with suppress(ImproperlyConfigured):
        retention, timeout = conf.retention, conf.next_link_timeout
        if conf.grip_proxies and retention and retention < timedelta(seconds=timeout):
            yield Warning(
                "EVENTSTREAM_RETENTION is shorter than EVENTSTREAM_NEXT_LINK_TIMEOUT. A stream"
                " that missed an event might ask for it only after the event is pruned, and would"
                " get a stream-reset.",
                hint="Increase EVENTSTREAM_RETENTION or decrease EVENTSTREAM_NEXT_LINK_TIMEOUT.",
                id="pg_eventstream.W005",
            )


def _check_channelmanager() -> Iterator[CheckMessage]:
    try:
        load_class(conf.channelmanager_class)
    except ImproperlyConfigured as e:
        yield Error(str(e).removesuffix(f" {HINT}"), hint=HINT, id="pg_eventstream.E007")


def _check_origins() -> Iterator[CheckMessage]:
    valid = True
    for name in ("EVENTSTREAM_ALLOW_ORIGIN", "EVENTSTREAM_ALLOW_ORIGINS"):
        problem = _find_problem_of_origins(getattr(settings, name, None) or [])
        if problem is not None:
            valid = False
            yield Error(
                f"{name} {problem}.",
                hint='Write an origin as browsers do: "https://example.com" or'
                ' "http://localhost:3000", without a path, a trailing slash or the default port.'
                ' The only wildcard is "*".',
                id="pg_eventstream.E014",
            )
    if valid and "*" in conf.allow_origins and conf.allow_credentials:
        yield Error(
            'EVENTSTREAM_ALLOW_CREDENTIALS cannot be combined with the origin "*": any page could'
            " read what its visitor is allowed to read.",
            hint="List the origins in EVENTSTREAM_ALLOW_ORIGINS.",
            id="pg_eventstream.E015",
        )


def _find_problem_of_origins(value: object) -> str | None:
    if not _is_text(value):
        return "must be an origin or a list of origins"
    for origin in [value] if isinstance(value, str) else value:
        if origin != "*" and not _ORIGIN.fullmatch(origin.lower()):
            return f"contains {origin!r}, which is not an origin"
    return None


def _check_headers() -> Iterator[CheckMessage]:
    headers = getattr(settings, "EVENTSTREAM_ALLOW_HEADERS", None) or []
    if not _is_text(headers) or not all(map(_HEADER.fullmatch, conf.allow_headers)):
        yield Error(
            "EVENTSTREAM_ALLOW_HEADERS must consist of header names.",
            hint='Use a list, or a string with commas: "Authorization, X-Requested-With".',
            id="pg_eventstream.E016",
        )


def _check_metrics_token() -> Iterator[CheckMessage]:
    try:
        _ = conf.metrics_token
    except ImproperlyConfigured as e:
        yield Error(
            str(e),
            hint="Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            id="pg_eventstream.E022",
        )


def _check_old_settings() -> Iterator[CheckMessage]:
    """Settings of django-eventstream that have no counterpart."""
    for name in _OLD_SETTINGS:
        if getattr(settings, name, None):
            yield Warning(
                f"{name} has no effect: pg_eventstream stores every event in PostgreSQL, from"
                " which all processes read it.",
                hint="Remove the setting.",
                id="pg_eventstream.W002",
            )


def _check_daphne() -> Iterator[CheckMessage]:
    if apps.is_installed("daphne") and not getattr(settings, "ASGI_APPLICATION", None):
        yield Warning(
            "ASGI_APPLICATION is not set, and daphne's runserver does not start without it.",
            hint='Name the application in your asgi.py: "myproject.asgi.application".',
            id="pg_eventstream.W008",
        )


def _check_runserver() -> Iterator[CheckMessage]:
    if not settings.DEBUG or conf.grip_proxies:
        return
    if get_commands()["runserver"] not in _WSGI_RUNSERVERS:
        return
    if apps.is_installed("daphne"):
        remedy = 'Move "daphne" to the first place in INSTALLED_APPS.'
    else:
        remedy = (
            'pip install daphne, add "daphne" as the first entry of INSTALLED_APPS, and set'
            ' ASGI_APPLICATION = "myproject.asgi.application".'
        )
    yield Warning(
        "runserver runs the project under WSGI, which cannot stream without a GRIP proxy: the"
        " endpoint answers 501.",
        hint=f"{remedy} If you develop with another ASGI server, add this check's id to"
        " SILENCED_SYSTEM_CHECKS.",
        id="pg_eventstream.W006",
    )


def _is_text(value: object) -> TypeGuard[str | Collection[str]]:
    """Whether it is a string or a collection of strings."""
    return isinstance(value, str) or (
        isinstance(value, list | tuple | set | frozenset)
        and all(isinstance(item, str) for item in value)
    )
