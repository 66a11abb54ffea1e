"""Checks of the GRIP proxies: GRIP_URL, GRIP_PROXIES, their keys, and the middleware."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import jwt
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from jwt.algorithms import has_crypto

from ..conf import conf
from ..grip.next_links import EXEMPT

_MIDDLEWARE = "django_grip.GripMiddleware"
_SECURITY_MIDDLEWARE = "django.middleware.security.SecurityMiddleware"
_FASTLY = "api.fastly.com"
# The minimum length of a key for HS256: RFC 7518, 3.2.
_SECRET_BYTES = 32


def check_proxies() -> Iterator[CheckMessage]:
    proxies = conf.grip_proxies
    for proxy in proxies:
        yield from _check_address(proxy)
    if proxies:
        yield from _check_middleware()
        yield from _check_tls_redirect()
    yield from _check_single_source()
    for proxy in proxies:
        errors = [*_check_missing_key(proxy), *_check_key_formats(proxy), *_check_fastly(proxy)]
        yield from errors or _check_secret_length(proxy)


def _check_address(proxy: dict[str, Any]) -> Iterator[CheckMessage]:
    if "control_uri" not in proxy:
        yield Error(
            "An entry of GRIP_PROXIES has no control_uri.",
            hint="Set control_uri to the HTTP address of the proxy's control port. ZeroMQ"
            " addresses are not supported.",
            id="pg_eventstream.E008",
        )
    elif not str(proxy["control_uri"]).startswith(("http://", "https://")):
        yield Error(
            f"The proxy address {proxy['control_uri']!r} is not an HTTP address.",
            hint='For Pushpin on the same machine: GRIP_URL = "http://localhost:5561".',
            id="pg_eventstream.E008",
        )
    elif not proxy.get("key") and not proxy.get("verify_key"):
        yield Warning(
            f"No key is configured for the proxy {proxy['control_uri']}, so anyone who can reach"
            " the application directly can pose as the proxy.",
            hint="Set sig_key in pushpin.conf, and the same key in GRIP_URL:"
            ' "http://localhost:5561?key=…".',
            id="pg_eventstream.W001",
        )


def _check_middleware() -> Iterator[CheckMessage]:
    if _MIDDLEWARE not in settings.MIDDLEWARE:
        yield Error(
            "A GRIP proxy is configured, but django-grip's middleware is not in MIDDLEWARE.",
            hint=f'Add "{_MIDDLEWARE}" as the first entry of MIDDLEWARE.',
            id="pg_eventstream.E009",
        )


def _check_tls_redirect() -> Iterator[CheckMessage]:
    if settings.SECURE_SSL_REDIRECT and not _next_links_are_exempt():
        yield Warning(
            "SECURE_SSL_REDIRECT redirects the proxy's own requests, unless they come over TLS or"
            " SECURE_PROXY_SSL_HEADER says so. The streams of redirected requests end soon after"
            " they were opened.",
            hint=f'Exempt the paths of these requests: SECURE_REDIRECT_EXEMPT = [r"{EXEMPT}"].'
            " (Pushpin sends X-Forwarded-Proto with them only if both accept_x_forwarded_protocol"
            " and set_x_forwarded_protocol are on.)",
            id="pg_eventstream.W004",
        )


def _next_links_are_exempt() -> bool:
    """Whether SecurityMiddleware redirects no next links. They can be mounted anywhere."""
    if _SECURITY_MIDDLEWARE not in settings.MIDDLEWARE:
        return True
    patterns = [re.compile(pattern) for pattern in settings.SECURE_REDIRECT_EXEMPT]
    return any("next" in p.pattern or p.search("events/next-token") for p in patterns)


def _check_single_source() -> Iterator[CheckMessage]:
    if hasattr(settings, "GRIP_PROXIES") and getattr(settings, "GRIP_URL", None):
        # django_grip.py, _get_proxies. A forged signature is compared with every entry: a second
        # of CPU after some 10,000 requests.
        yield Error(
            "GRIP_PROXIES and GRIP_URL are both set. django-grip appends GRIP_URL to GRIP_PROXIES"
            " with every signed request, so each request takes longer than the one before.",
            hint="Move the address into the list:"
            " GRIP_PROXIES = [..., gripcontrol.parse_grip_uri(url)].",
            id="pg_eventstream.E010",
        )


def _check_missing_key(proxy: dict[str, Any]) -> Iterator[CheckMessage]:
    if proxy.get("verify_key") and not proxy.get("key"):
        # django_grip.py, GripMiddleware.process_request: KeyError
        yield Error(
            f"The proxy {proxy.get('control_uri')} has a verify key (GRIP_VERIFY_KEY) but no key."
            " django-grip raises KeyError for every signed request.",
            hint="Add a key: key=… in GRIP_URL, or key in GRIP_PROXIES. Pushpin needs only that"
            " one, the sig_key of pushpin.conf.",
            id="pg_eventstream.E011",
        )


def _check_key_formats(proxy: dict[str, Any]) -> Iterator[CheckMessage]:
    for name in ("key", "verify_key"):
        problem = _find_problem_of_key(proxy.get(name) or "")
        if problem is not None:
            yield Error(
                f"The {name} of the proxy {proxy.get('control_uri')} {problem}.",
                hint="A verify key is a shared secret, or a public key in PEM format. A public key"
                " goes into GRIP_VERIFY_KEY with its line breaks, or into GRIP_URL as"
                " verify-key=base64:….",
                id="pg_eventstream.E012",
            )


def _find_problem_of_key(key: str | bytes) -> str | None:
    text = key.decode(errors="replace") if isinstance(key, bytes) else key
    if text.startswith("base64:"):  # django-grip would use it as the secret
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
    return "is not a valid key for ES256 or RS256"


def _check_fastly(proxy: dict[str, Any]) -> Iterator[CheckMessage]:
    uri = str(proxy.get("control_uri"))
    if not uri.startswith(f"https://{_FASTLY}/"):
        return
    if not proxy.get("verify_key") or not proxy.get("verify_iss"):
        yield Error(
            f"The proxy {uri} needs a verify key and a verify issuer, because Fastly signs the"
            " requests of all services with the same key.",
            hint=f'GRIP_URL = "https://{_FASTLY}/service/ID?key=API-TOKEN'
            "&verify-iss=fastly:ID\", and Fastly's public key in GRIP_VERIFY_KEY.",
            id="pg_eventstream.E013",
        )


def _check_secret_length(proxy: dict[str, Any]) -> Iterator[CheckMessage]:
    secret = proxy.get("verify_key") or proxy.get("key") or ""
    length = len(secret.encode() if isinstance(secret, str) else secret)
    if 0 < length < _SECRET_BYTES:
        yield Warning(
            f"The secret shared with the proxy {proxy.get('control_uri')} is shorter than"
            f" {_SECRET_BYTES} bytes. Anyone who guesses it can pose as the proxy and read every"
            " channel.",
            hint="Set a longer one, in pushpin.conf as well: python -c"
            ' "import secrets; print(secrets.token_urlsafe(32))"',
            id="pg_eventstream.W003",
        )
