"""A GRIP proxy's control endpoint: the POST that publishes a batch.

pubcontrol's own client is not used for the POST: it has no timeout, repeats POSTs
blindly, and goes on after a batch that failed.
"""

from __future__ import annotations

import http.client
import re
import select
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import jwt
from django.core.exceptions import ImproperlyConfigured

from ..conf import proxy_name
from ..limits import LIMITS, Limits

_TOKEN_SECONDS = 600
_BEARER = re.compile("[!-~]+")


class Refused(Exception):
    """The proxy refused the request, and will refuse it again."""


class Unavailable(Exception):
    """The proxy could not be reached, or not take the request now."""


class Proxy:
    """One proxy's control endpoint. Used by one thread."""

    def __init__(self, config: dict[str, Any], limits: Limits = LIMITS) -> None:
        uri = urlsplit(str(config.get("control_uri", "")))
        if uri.scheme not in ("http", "https"):
            raise ImproperlyConfigured(
                f"The address of a proxy (GRIP_URL, control_uri in GRIP_PROXIES) must begin with"
                f" http:// or https://; it is {uri.geturl()!r}."
            )
        self.name = proxy_name(config)
        self._limits = limits
        self._target = urlunsplit(("", "", f"{uri.path.rstrip('/')}/publish/", uri.query, ""))
        self._connection: http.client.HTTPConnection
        if uri.scheme == "https":
            self._connection = http.client.HTTPSConnection(
                uri.hostname or "", uri.port, context=ssl.create_default_context()
            )
        else:
            self._connection = http.client.HTTPConnection(uri.hostname or "", uri.port)
        self._issuer = config.get("control_iss")
        self._key = config.get("key")
        self._token: tuple[float, str] = (0.0, "")

    def post(self, body: bytes, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Publish a batch: all of it or nothing. While the proxy works, ``meanwhile`` is called.

        Raises `Refused` if the proxy finds fault with the batch itself, `Unavailable` if
        the same batch may succeed later. Waits for 13 seconds at most.
        """
        headers = {"Content-Type": "application/json", **self.authorization()}
        try:
            self._connect()
            self._connection.request("POST", self._target, body, headers)
            meanwhile()
            with self._connection.getresponse() as response:
                answer = response.read()
        except (OSError, http.client.HTTPException) as e:
            self._connection.close()
            raise Unavailable(f"cannot be reached: {e or type(e).__name__}") from e
        except BaseException:
            self._connection.close()  # the answer to this is not the answer to the next
            raise
        if 200 <= response.status < 300:
            return
        text = answer[:300].decode(errors="replace").strip()
        message = f"answered {response.status}: {text}"
        if response.status in (400, 413):
            raise Refused(message)
        if response.status in (401, 403):
            message += " - check iss and key in GRIP_URL"
        elif response.status == 404:
            message += " - check the path in GRIP_URL"
        raise Unavailable(message)

    def _connect(self) -> None:
        """Pushpin closes the connection behind each answer; others keep it, for a while."""
        if self._connection.sock is not None:
            readable = select.poll()  # not select(), which takes no number above 1023
            readable.register(self._connection.sock, select.POLLIN)
            if not readable.poll(0):
                return
            self._connection.close()  # what there is to read now is its end
        self._connection.timeout = self._limits.proxy_connect
        self._connection.connect()
        self._connection.sock.settimeout(self._limits.proxy_answer)

    def close(self) -> None:
        """Let go of the connection; the next batch makes another."""
        self._connection.close()

    def authorization(self) -> dict[str, str]:
        """As gripcontrol does: a signed token if there is an issuer, else the key itself."""
        if not self._key:
            return {}
        if not self._issuer:
            key = self._key if isinstance(self._key, str) else self._key.decode("latin-1")
            # Other bytes make no token. They are what Pushpin signs with; it asks for none.
            return {"Authorization": f"Bearer {key}"} if _BEARER.fullmatch(key) else {}
        renew_at, token = self._token
        now = time.time()
        if now >= renew_at:
            token = jwt.encode({"iss": self._issuer, "exp": int(now) + _TOKEN_SECONDS}, self._key)
            self._token = (now + _TOKEN_SECONDS / 2, token)
        return {"Authorization": f"Bearer {token}"}
