"""Settings: one typed property each, read at call time, validated by `checks`.

A number that makes no sense raises `ImproperlyConfigured` here as well: application servers run no
checks, and a retention of zero would prune everything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from reprlib import repr as shortened
from typing import Any, TypeGuard
from urllib.parse import urlsplit, urlunsplit

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from gripcontrol import parse_grip_uri

from .postgres.connector import refuse_if_not_postgresql

#: The maximum number of channels of a stream. The proxy holds 20 per connection and silently drops
#: the rest (Pushpin: connection_subscription_max); one of them is the user's.
MOST_CHANNELS = 19

# Keeps dates in the range of Python's datetime and PostgreSQL's timestamp.
_MOST_DAYS = 365_000
# A next link is valid for a day (`grip.links.sign`), and poll() waits for less than 25 days.
_DAY_SECONDS = 86_400
# What can be in a header, and is too long to be guessed.
_TOKEN, _TOKEN_LENGTH = re.compile("[!-~]+"), 20


class Conf:
    def check_numbers(self) -> None:
        """Raise `ImproperlyConfigured` if one of the numbers makes no sense.

        Call it before starting something that reads them later, in a thread or during a stream.
        """
        _ = (self.retention, self.replay_age, self.safety_poll, self.max_age)
        _ = (self.channel_limit, self.next_link_timeout, self.consumer_hold)

    @property
    def database(self) -> str:
        """The alias of the database that holds the events.

        Raises `ImproperlyConfigured` if there is no such alias, or it is not PostgreSQL.
        """
        alias = self.database_alias
        if alias not in connections:
            raise ImproperlyConfigured(
                f"EVENTSTREAM_DATABASE is {alias!r}, which is not in DATABASES. The aliases there"
                f" are: {', '.join(connections)}."
            )
        refuse_if_not_postgresql(alias)
        return alias

    @property
    def database_alias(self) -> str:
        """The value of EVENTSTREAM_DATABASE, which may be wrong."""
        return str(getattr(settings, "EVENTSTREAM_DATABASE", "default"))

    @property
    def retention(self) -> timedelta | None:
        """How long a sequenced event is kept. Default: 24 hours. A number is in seconds.

        None keeps events of any age.
        """
        return _duration("EVENTSTREAM_RETENTION", timedelta(hours=24), "to keep all events")

    @property
    def consumer_hold(self) -> timedelta:
        """How long an event that a consumer has not handled is kept past the retention.

        It counts from when the event was sequenced. Default: 7 days. A number is in seconds.
        """
        hold = _duration("EVENTSTREAM_CONSUMER_HOLD", timedelta(days=7), None)
        assert hold is not None  # noqa: S101
        return hold

    @property
    def replay_age(self) -> timedelta | None:
        """The age of the oldest event that a client can begin with. A number is in seconds.

        None, the default, means all events that are kept.
        """
        age = _duration("EVENTSTREAM_REPLAY_AGE", None, "for all events that are kept")
        retention = self.retention
        return None if age and retention and age >= retention else age

    @property
    def safety_poll(self) -> float | None:
        """Seconds between two looks at the database while no notification arrives. Default: 5.

        None switches the poll off. Then only the doorbell wakes the publisher.
        """
        return _seconds("EVENTSTREAM_SAFETY_POLL", 5.0, "for no poll", _DAY_SECONDS)

    @property
    def channel_limit(self) -> int:
        """Channels per stream. Default: 10. A setting above 19 counts as 19."""
        return min(_integer("EVENTSTREAM_CHANNEL_LIMIT", 10), MOST_CHANNELS)

    @property
    def next_link_timeout(self) -> int:
        """Seconds after which the proxy asks the application how to continue a quiet stream.

        Permissions are checked again at that time. Default: 600.
        """
        return _integer("EVENTSTREAM_NEXT_LINK_TIMEOUT", 600, _DAY_SECONDS)

    @property
    def max_age(self) -> float | None:
        """Seconds after which a stream without a proxy ends, so that its client reconnects.

        None, the default, means never.
        """
        return _seconds("EVENTSTREAM_MAX_AGE", None, "for no limit", _MOST_DAYS * _DAY_SECONDS)

    @property
    def channelmanager_class(self) -> str:
        """Dotted path of the channel manager."""
        return str(
            getattr(
                settings,
                "EVENTSTREAM_CHANNELMANAGER_CLASS",
                "pg_eventstream.channelmanager.DefaultChannelManager",
            )
        )

    @property
    def allow_origins(self) -> list[str]:
        """The origins in EVENTSTREAM_ALLOW_ORIGIN and _ORIGINS, whose pages may read streams.

        In lower case, as browsers send them. "*" stands for any origin.
        """
        return [
            origin.lower()
            for name in ("EVENTSTREAM_ALLOW_ORIGIN", "EVENTSTREAM_ALLOW_ORIGINS")
            for origin in _strings(name)
        ]

    @property
    def allow_credentials(self) -> bool:
        """Whether those pages may send cookies."""
        return bool(getattr(settings, "EVENTSTREAM_ALLOW_CREDENTIALS", False))

    @property
    def allow_headers(self) -> list[str]:
        """Additional request headers that those pages may send. A string is split at commas."""
        value = _strings("EVENTSTREAM_ALLOW_HEADERS")
        return [name.strip() for text in value for name in text.split(",") if name.strip()]

    @property
    def metrics_token(self) -> str | None:
        """The token that Prometheus sends to `views.metrics`. None, the default: there is none.

        Raises `ImproperlyConfigured` if it could be guessed.
        """
        token = getattr(settings, "EVENTSTREAM_METRICS_TOKEN", None)
        if token is None:
            return None
        if isinstance(token, str) and len(token) >= _TOKEN_LENGTH and _TOKEN.fullmatch(token):
            return token
        raise ImproperlyConfigured(
            f"EVENTSTREAM_METRICS_TOKEN must be a text of at least {_TOKEN_LENGTH} characters, all"
            " of them printable ASCII without spaces."
        )

    @property
    def grip_prefix(self) -> str:
        """Prepended to every channel name at the proxy, as django-grip does."""
        return str(getattr(settings, "GRIP_PREFIX", ""))

    @property
    def grip_proxies(self) -> list[dict[str, Any]]:
        """The proxies of GRIP_PROXIES and GRIP_URL, each once, as gripcontrol configures them.

        A proxy without a verify key gets GRIP_VERIFY_KEY. These are copies, because django-grip
        appends GRIP_URL to the GRIP_PROXIES list itself, again with every signed request
        (django_grip.py, _get_proxies).
        """
        configured = [dict(entry) for entry in getattr(settings, "GRIP_PROXIES", [])]
        url = getattr(settings, "GRIP_URL", None)
        if url:
            configured.append(parse_grip_uri(url))
        verify_key = getattr(settings, "GRIP_VERIFY_KEY", None)
        if verify_key:
            for entry in configured:
                entry.setdefault("verify_key", verify_key)
        unique: list[dict[str, Any]] = []
        for entry in configured:
            if all(entry.get("control_uri") != other.get("control_uri") for other in unique):
                unique.append(entry)
        return unique


def proxy_name(config: dict[str, Any]) -> str:
    """The name of a proxy in the database and in logs: its control URI without credentials."""
    uri = urlsplit(str(config.get("control_uri", "")))
    return urlunsplit((uri.scheme, uri.netloc.rpartition("@")[2], uri.path.rstrip("/"), "", ""))


def _duration(name: str, default: timedelta | None, without: str | None) -> timedelta | None:
    """Read a setting that is a timedelta or a number of seconds.

    ``without`` says what None means. If it is None, None is refused.
    """
    value = getattr(settings, name, default)
    if value is None and without is not None:
        return None
    # Compared as a timedelta, as it is used: a number that rounds to zero is refused, too.
    with suppress(OverflowError, ValueError):
        age = timedelta(seconds=value) if _is_number(value) else value
        if isinstance(age, timedelta) and timedelta(0) < age <= timedelta(days=_MOST_DAYS):
            return age
    raise ImproperlyConfigured(
        f"{name} must be a timedelta or a number of seconds, greater than zero and at most"
        f" {_MOST_DAYS:,} days{'' if without is None else f', or None {without}'}; it is"
        f" {shortened(value)}."
    )


def _seconds(name: str, default: float | None, without: str, most: int) -> float | None:
    """Read a setting that is a number of seconds."""
    value = getattr(settings, name, default)
    if value is None:
        return None
    if _is_number(value) and 0 < value <= most:
        return float(value)
    raise ImproperlyConfigured(
        f"{name} must be a number of seconds, greater than zero and at most {most:,}, or None"
        f" {without}; it is {shortened(value)}."
    )


def _integer(name: str, default: int, most: float = math.inf) -> int:
    """Read a setting that is a whole number."""
    value = getattr(settings, name, default)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most:
        return value
    at_most = "" if most == math.inf else f", at most {most:,}"
    raise ImproperlyConfigured(
        f"{name} must be a whole number, greater than zero{at_most}; it is {shortened(value)}."
    )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _strings(name: str) -> list[str]:
    """Read a setting that is a string, a list of strings, or missing."""
    value = getattr(settings, name, None) or ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Iterable) or not all(isinstance(text, str) for text in texts):
        raise ImproperlyConfigured(
            f"{name} must be a string or a list of strings; it is {shortened(value)}."
        )
    return [text for text in texts if text]


conf = Conf()
