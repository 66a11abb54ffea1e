"""The signature of a GRIP proxy, Grip-Sig: says in the log why one does not verify.

`django_grip.GripMiddleware` decides whether a request came through a proxy. One whose signature
does not verify counts as any client's. That is safe, since a signature only adds to what a client
may do; but under ASGI it makes a plain reverse proxy of the GRIP proxy, which nobody would notice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import jwt
from django.http import HttpRequest
from gripcontrol import validate_sig

from ..conf import conf, proxy_name
from ..rarely import Rarely

logger = logging.getLogger("pg_eventstream.signature")

_ALGORITHMS = ["HS256", "RS256", "ES256"]  # as in gripcontrol
_rarely = Rarely()


def is_verified(signature: str) -> bool:
    """Whether a proxy of ours signed it, as `django_grip.GripMiddleware` decides."""
    return any(not key or validate_sig(signature, key, iss=issuer) for _, key, issuer in _proxies())


def warn_if_unverified(request: HttpRequest) -> None:
    """Log, at most once in ten minutes for each reason, why this request counts as direct.

    The log has no part of a key and nothing that a client might have written.
    """
    signature = request.META.get("HTTP_GRIP_SIG")
    if not signature:
        return
    reason, what_to_do = _explain(request, signature)
    if _rarely(reason):
        logger.warning(
            "A request has the signature of a GRIP proxy (Grip-Sig), and %s. It is treated as one"
            " without a proxy: ASGI streams it directly, WSGI answers 501. %s",
            reason,
            what_to_do,
        )


def _explain(request: HttpRequest, signature: str) -> tuple[str, str]:
    proxies = list(_proxies())
    if not proxies:
        return (
            "no proxy is configured",
            "Set GRIP_URL to the control address of the proxy, with its key, and add"
            ' "django_grip.GripMiddleware" to MIDDLEWARE.',
        )
    if not hasattr(request, "grip"):
        return (
            "nothing verifies it",
            'Add "django_grip.GripMiddleware" to MIDDLEWARE, as its first entry.',
        )
    for name, key, issuer in proxies:
        try:
            claims = jwt.decode(
                signature, key, algorithms=_ALGORITHMS, options={"verify_exp": False}
            )
        except Exception:  # noqa: BLE001, S112  (as gripcontrol does: not the key, or no token)
            continue
        # From here on the proxy itself has written the token.
        if issuer is not None and claims.get("iss") != issuer:
            return (
                f"the key of {name} verifies it, but its issuer is not the configured one",
                f"Compare verify-iss in GRIP_URL ({issuer!r}) with sig_iss in pushpin.conf"
                f" ({claims.get('iss')!r}).",
            )
        return (
            f"it was made with the key of {name}, but has expired",
            "Compare the clocks of the proxy's machine and of this one.",
        )
    names = ", ".join(name for name, _, _ in proxies)
    return (
        f"it was made with no key of the configured proxies ({names})",
        "Compare the key in GRIP_URL (or GRIP_PROXIES, GRIP_VERIFY_KEY) with sig_key in"
        " pushpin.conf: they must be equal. If they are, somebody sends forged signatures.",
    )


def _proxies() -> Iterator[tuple[str, Any, str | None]]:
    """Name, key to verify with, and issuer if it matters, of each proxy."""
    for entry in conf.grip_proxies:
        key = entry.get("verify_key", entry.get("key"))
        yield proxy_name(entry), key, entry.get("verify_iss")
