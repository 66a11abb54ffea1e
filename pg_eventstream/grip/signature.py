"""Logs why the signature of a GRIP proxy, Grip-Sig, cannot be verified.

`django_grip.GripMiddleware` decides whether a request came through a proxy. A request whose
signature cannot be verified is treated like that of any client. That is safe, because a signature
only adds permissions. But under ASGI the GRIP proxy would silently become a plain reverse proxy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jwt
from django.http import HttpRequest
from gripcontrol import validate_sig

from ..conf import conf, proxy_name
from ..rarely import Rarely

logger = logging.getLogger("pg_eventstream.signature")

_ALGORITHMS = ["HS256", "RS256", "ES256"]  # as in gripcontrol
_rarely = Rarely()


class Unverified(NamedTuple):
    """Why the signature of a direct request does not count, and what to do."""

    #: For programs, such as "wrong-key".
    code: str
    reason: str
    remedy: str


def is_verified(signature: str) -> bool:
    """Whether a configured proxy made the signature, as `django_grip.GripMiddleware` decides."""
    return any(not key or validate_sig(signature, key, iss=issuer) for _, key, issuer in _proxies())


def warn_if_unverified(request: HttpRequest) -> None:
    """Log why this request counts as direct, at most once in ten minutes for each reason.

    The message contains no part of a key and nothing that a client could have written.
    """
    if (explained := explain(request)) is None:
        return
    if _rarely(explained.reason):
        logger.warning(
            "A request has the signature of a GRIP proxy (Grip-Sig), but %s. It is treated as a"
            " request without a proxy: ASGI streams directly, WSGI answers 501. %s",
            explained.reason,
            explained.remedy,
            extra={"event": "signature-invalid"},
        )


def explain(request: HttpRequest) -> Unverified | None:
    """Why the signature of this direct request does not count, and what to do.

    None if it has no signature.
    """
    signature = request.META.get("HTTP_GRIP_SIG")
    if not signature:
        return None
    proxies = list(_proxies())
    if not proxies:
        return Unverified(
            "no-grip-url",
            "no proxy is configured",
            "Set GRIP_URL to the control address of the proxy, with its key, and add"
            ' "django_grip.GripMiddleware" to MIDDLEWARE.',
        )
    if not hasattr(request, "grip"):
        return Unverified(
            "no-grip-middleware",
            "nothing verifies it",
            'Add "django_grip.GripMiddleware" as the first entry of MIDDLEWARE.',
        )
    for name, key, issuer in proxies:
        try:
            claims = jwt.decode(
                signature, key, algorithms=_ALGORITHMS, options={"verify_exp": False}
            )
        except Exception:  # noqa: BLE001, S112  (as in gripcontrol: another key, or no token)
            continue
        # From here on it is certain that the proxy wrote the token.
        if issuer is not None and claims.get("iss") != issuer:
            return Unverified(
                "wrong-issuer",
                f"its issuer is not the one that is configured for {name}, whose key verifies it",
                f"Compare verify-iss in GRIP_URL ({issuer!r}) with sig_iss in pushpin.conf"
                f" ({claims.get('iss')!r}).",
            )
        return Unverified(
            "expired-signature",
            f"it has expired; it was made with the key of {name}",
            "Compare the clocks of the proxy's machine and of this one.",
        )
    names = ", ".join(name for name, _, _ in proxies)
    return Unverified(
        "wrong-key",
        f"it was not made with a key of the configured proxies ({names})",
        "Compare the key in GRIP_URL (or GRIP_PROXIES, GRIP_VERIFY_KEY) with sig_key in"
        " pushpin.conf: they must be equal. If they are, someone sends forged signatures.",
    )


def _proxies() -> Iterator[tuple[str, Any, str | None]]:
    """Yield the name, the verify key and the issuer (None for any) of each proxy."""
    for entry in conf.grip_proxies:
        key = entry.get("verify_key", entry.get("key"))
        yield proxy_name(entry), key, entry.get("verify_iss")
