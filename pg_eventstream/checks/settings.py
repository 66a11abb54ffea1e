"""System checks: a wrong setting is reported at start, with what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import jwt
from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.core.management import get_commands
from django.db import DEFAULT_DB_ALIAS, connections
from jwt.algorithms import has_crypto

from ..channelmanager import HINT, load_class
from ..conf import MOST_CHANNELS, conf
from ..grip.next_links import EXEMPT
from ..tables import placement
from ..tables.placement import ROUTER

_MIDDLEWARE = "django_grip.GripMiddleware"
_SECURITY_MIDDLEWARE = "django.middleware.security.SecurityMiddleware"
_FASTLY = "api.fastly.com"
_ORIGIN = re.compile(
    r"(?!http://.*:80$)(?!https://.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d+)?"
)
# RFC 7518, 3.2: what a key for HS256 must have at least.
_SECRET_BYTES = 32
_LEAST_TIMEOUT = 5
_WSGI_RUNSERVERS = ("django.core", "django.contrib.staticfiles")
_HEADER = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)


@register
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    return [
        *_check_database(),
        *_check_numbers(),
        *_check_limits(),
        *_check_channelmanager(),
        *_check_grip(),
        *_check_grip_keys(),
        *_check_cors(),
        *_check_leftovers(),
        *_check_runserver(),
    ]


def _check_database() -> Iterator[CheckMessage]:
    try:
        database = conf.database
    except ImproperlyConfigured as e:
        known = conf.database_alias in connections
        yield Error(
            str(e),
            hint="Keep the tables out of the others with our database router:"
            f' DATABASE_ROUTERS = ["{ROUTER}"].'
            if known
            else f"Use one of: {', '.join(connections)}.",
            id="pg_eventstream.E002" if known else "pg_eventstream.E001",
        )
        return
    for alias in connections:
        if problem := placement.problem_of(alias):
            # One that no command migrates, but for those that create test databases.
            passive = alias not in (database, DEFAULT_DB_ALIAS)
            yield (Warning if passive else Error)(
                problem.message,
                hint=problem.hint,
                id="pg_eventstream.W007" if passive else "pg_eventstream.E019",
            )


#: The settings that are numbers, and what each is for.
_NUMBERS = [
    (
        "retention",
        "Clients that lose their connection resume from the events that are kept. For a day,"
        " which is the default: timedelta(hours=24).",
        "pg_eventstream.E003",
    ),
    (
        "replay_age",
        "Leave it out to let clients begin with any event that is kept.",
        "pg_eventstream.E018",
    ),
    (
        "channel_limit",
        "The default is 10 channels for each stream.",
        "pg_eventstream.E004",
    ),
    (
        "next_link_timeout",
        "Every quiet stream asks the origin once in so many seconds, by a link that works for a"
        " day. The default is 600.",
        "pg_eventstream.E005",
    ),
    (
        "safety_poll",
        "The default, 5, is how long an event waits at most if its ring is lost.",
        "pg_eventstream.E006",
    ),
    (
        "max_age",
        "A stream without a proxy ends after that time, and its client comes back.",
        "pg_eventstream.E017",
    ),
]


def _check_numbers() -> Iterator[CheckMessage]:
    found: set[str] = set()
    for attribute, hint, number in _NUMBERS:
        try:
            getattr(conf, attribute)
        except ImproperlyConfigured as e:
            if str(e) not in found:  # which another number depends on
                yield Error(str(e), hint=hint, id=number)
            found.add(str(e))


def _check_limits() -> Iterator[CheckMessage]:
    """Numbers that would work, but not as they were meant."""
    with suppress(ImproperlyConfigured):
        if conf.channel_limit < getattr(settings, "EVENTSTREAM_CHANNEL_LIMIT", 0):
            yield Error(
                f"EVENTSTREAM_CHANNEL_LIMIT must be a number from 1 to {MOST_CHANNELS}.",
                hint="A GRIP proxy holds 20 channels for a connection, one of which is the"
                " user's, and cuts off the others without saying so.",
                id="pg_eventstream.E004",
            )
    with suppress(ImproperlyConfigured):
        if conf.next_link_timeout < _LEAST_TIMEOUT:
            yield Error(
                f"EVENTSTREAM_NEXT_LINK_TIMEOUT must be at least {_LEAST_TIMEOUT} seconds.",
                hint="Every quiet stream asks the origin once in that time.",
                id="pg_eventstream.E005",
            )
    with suppress(ImproperlyConfigured):
        retention, timeout = conf.retention, conf.next_link_timeout
        if conf.grip_proxies and retention and retention < timedelta(seconds=timeout):
            yield Warning(
                "EVENTSTREAM_RETENTION is shorter than EVENTSTREAM_NEXT_LINK_TIMEOUT. A stream"
                " that has missed an event may ask for it only after that time, and gets a"
                " stream-reset then.",
                hint="Keep events for longer, or let the proxy ask sooner.",
                id="pg_eventstream.W005",
            )


def _check_channelmanager() -> Iterator[CheckMessage]:
    try:
        load_class(conf.channelmanager_class)
    except ImproperlyConfigured as e:
        yield Error(str(e).removesuffix(f" {HINT}"), hint=HINT, id="pg_eventstream.E007")


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
        elif not entry.get("key") and not entry.get("verify_key"):
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
    if conf.grip_proxies and settings.SECURE_SSL_REDIRECT and not _links_may_come_over_http():
        messages.append(
            Warning(
                "SECURE_SSL_REDIRECT redirects the proxy's own requests, unless they come over TLS"
                " or say so: then streams end soon after they were opened.",
                hint=f'Set SECURE_REDIRECT_EXEMPT = [r"{EXEMPT}"], which are the paths of these'
                " requests. (Pushpin sends X-Forwarded-Proto with them only if both"
                " accept_x_forwarded_protocol and set_x_forwarded_protocol are on.)",
                id="pg_eventstream.W004",
            )
        )
    if hasattr(settings, "GRIP_PROXIES") and getattr(settings, "GRIP_URL", None):
        # django_grip.py, _get_proxies. A forged signature is tried with every entry: a second
        # of CPU after some 10,000 requests.
        messages.append(
            Error(
                "GRIP_PROXIES and GRIP_URL are both set. django-grip appends the one to the other"
                " with every signed request, and each takes longer than the one before.",
                hint="Move the address into the list:"
                " GRIP_PROXIES = [..., gripcontrol.parse_grip_uri(url)].",
                id="pg_eventstream.E010",
            )
        )
    return messages


def _links_may_come_over_http() -> bool:
    """Whether SecurityMiddleware lets next links alone. They may be mounted anywhere."""
    if _SECURITY_MIDDLEWARE not in settings.MIDDLEWARE:
        return True
    patterns = [re.compile(pattern) for pattern in settings.SECURE_REDIRECT_EXEMPT]
    return any("next" in p.pattern or p.search("events/next-token") for p in patterns)


def _check_grip_keys() -> list[CheckMessage]:
    messages: list[CheckMessage] = []
    for entry in conf.grip_proxies:
        found = len(messages)
        uri = entry.get("control_uri")
        if entry.get("verify_key") and not entry.get("key"):
            # django_grip.py, GripMiddleware.process_request: KeyError
            messages.append(
                Error(
                    f"The proxy {uri} has a verify key (GRIP_VERIFY_KEY) and no key, and"
                    " django-grip fails with a KeyError on every signed request.",
                    hint="Give it a key too: key=… in GRIP_URL, or key in GRIP_PROXIES. Pushpin"
                    " needs that one only, the sig_key of pushpin.conf.",
                    id="pg_eventstream.E011",
                )
            )
        for name in ("key", "verify_key"):
            problem = _problem_of_key(entry.get(name) or "")
            if problem:
                messages.append(
                    Error(
                        f"The {name} of the proxy {uri} {problem}.",
                        hint="A verify key is a shared secret, or a public key in PEM format:"
                        " in GRIP_VERIFY_KEY as it stands, with its line breaks, or in GRIP_URL"
                        " as verify-key=base64:….",
                        id="pg_eventstream.E012",
                    )
                )
        if str(uri).startswith(f"https://{_FASTLY}/") and not (
            entry.get("verify_key") and entry.get("verify_iss")
        ):
            messages.append(
                Error(
                    f"The proxy {uri} needs a verify key and a verify issuer: Fastly signs the"
                    " requests of all services with one key.",
                    hint=f'GRIP_URL = "https://{_FASTLY}/service/ID?key=API-TOKEN'
                    "&verify-iss=fastly:ID\", and Fastly's public key in GRIP_VERIFY_KEY.",
                    id="pg_eventstream.E013",
                )
            )
        secret = _as_bytes(entry.get("verify_key") or entry.get("key") or "")
        if len(messages) == found and 0 < len(secret) < _SECRET_BYTES:
            messages.append(
                Warning(
                    f"The secret shared with the proxy {uri} is shorter than {_SECRET_BYTES} bytes:"
                    " whoever guesses it can pose as the proxy, and read every channel.",
                    hint="Set a longer one, in pushpin.conf as well: python -c"
                    ' "import secrets; print(secrets.token_urlsafe(32))"',
                    id="pg_eventstream.W003",
                )
            )
    return messages


def _problem_of_key(key: str | bytes) -> str | None:
    text = key.decode(errors="replace") if isinstance(key, bytes) else key
    if text.startswith("base64:"):  # django-grip would take it for the secret itself
        return "begins with base64:, which is decoded in GRIP_URL only"
    if text.lstrip().startswith("{"):
        return "is a JSON Web Key, which gripcontrol cannot read"
    if "-----BEGIN " not in text:
        return None
    if not has_crypto:
        return 'needs the package cryptography: pip install "pyjwt[crypto]"'
    for algorithm in ("ES256", "RS256"):
        with suppress(ValueError, jwt.InvalidKeyError):
            jwt.get_algorithm_by_name(algorithm).prepare_key(text)
            return None
    return "cannot be read as a key of ES256 or RS256"


def _as_bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


def _check_cors() -> list[CheckMessage]:
    messages: list[CheckMessage] = []
    for name in ("EVENTSTREAM_ALLOW_ORIGIN", "EVENTSTREAM_ALLOW_ORIGINS"):
        value = getattr(settings, name, None) or []
        if not _is_text(value):
            problem = "must be an origin or a list of them"
        else:
            origins = [value] if isinstance(value, str) else value
            wrong = [o for o in origins if o != "*" and not _ORIGIN.fullmatch(o.lower())]
            if not wrong:
                continue
            problem = f"names {wrong[0]!r}, which is not an origin"
        messages.append(
            Error(
                f"{name} {problem}.",
                hint='As a browser writes it: "https://example.com" or "http://localhost:3000".'
                ' Without a path or slash behind it or the usual port; no pattern but "*".',
                id="pg_eventstream.E014",
            )
        )
    if not messages and "*" in conf.allow_origins and conf.allow_credentials:
        messages.append(
            Error(
                'EVENTSTREAM_ALLOW_CREDENTIALS goes with origins that are named, not with "*":'
                " any page could read what its visitor may.",
                hint="Name the origins in EVENTSTREAM_ALLOW_ORIGINS.",
                id="pg_eventstream.E015",
            )
        )
    headers = getattr(settings, "EVENTSTREAM_ALLOW_HEADERS", None) or []
    if not _is_text(headers) or not all(map(_HEADER.fullmatch, conf.allow_headers)):
        messages.append(
            Error(
                "EVENTSTREAM_ALLOW_HEADERS must be names of headers.",
                hint='A list, or a string with commas: "Authorization, X-Requested-With".',
                id="pg_eventstream.E016",
            )
        )
    return messages


def _check_leftovers() -> list[CheckMessage]:
    """Settings of django-eventstream that have no counterpart."""
    return [
        Warning(
            f"{name} has no effect: every event is stored in PostgreSQL, from where all processes"
            " get it.",
            hint="Remove it.",
            id="pg_eventstream.W002",
        )
        for name in (
            "EVENTSTREAM_STORAGE_CLASS",
            "EVENTSTREAM_STORAGE_CONNECTION",
            "EVENTSTREAM_REDIS",
        )
        if getattr(settings, name, None)
    ]


def _check_runserver() -> Iterator[CheckMessage]:
    """Whether what one starts in development streams."""
    has_daphne = apps.is_installed("daphne")
    if has_daphne and not getattr(settings, "ASGI_APPLICATION", None):
        yield Warning(
            "ASGI_APPLICATION is not set, without which daphne's runserver does not start.",
            hint='Name the application of your asgi.py: "myproject.asgi.application".',
            id="pg_eventstream.W008",
        )
    if settings.DEBUG and not conf.grip_proxies and get_commands()["runserver"] in _WSGI_RUNSERVERS:
        if has_daphne:
            what_to_do = 'Move "daphne" to the first place in INSTALLED_APPS.'
        else:
            what_to_do = (
                'pip install daphne, add "daphne" as the first of INSTALLED_APPS, and set'
                ' ASGI_APPLICATION = "myproject.asgi.application".'
            )
        yield Warning(
            "runserver runs the project under WSGI, where nothing can be streamed without a GRIP"
            " proxy: the endpoint answers 501.",
            hint=f"{what_to_do} If you develop with another ASGI server, add this check's id to"
            " SILENCED_SYSTEM_CHECKS.",
            id="pg_eventstream.W006",
        )


def _is_text(value: object) -> bool:
    """Whether it is a string, or several."""
    return isinstance(value, str) or (
        isinstance(value, list | tuple | set | frozenset)
        and all(isinstance(item, str) for item in value)
    )
