"""A GRIP proxy's control endpoint: the POST that publishes a batch.

pubcontrol's client is not used for the POST, because it has no timeout, repeats POSTs in any case,
and continues after a failed batch.
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
    """The proxy refused the request and would refuse it again."""


class Unavailable(Exception):
    """The proxy could not be reached or cannot accept the request now."""


class Proxy:
    """The control endpoint of one proxy. It is used by one thread."""

    def __init__(self, config: dict[str, Any], limits: Limits = LIMITS) -> None:
        uri = urlsplit(str(config.get("control_uri", "")))
        if uri.scheme not in ("http", "https"):
            raise ImproperlyConfigured(
                "The address of a proxy (GRIP_URL, control_uri in GRIP_PROXIES) must begin with"
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
        """Publish a batch completely or not at all. Calls ``meanwhile`` while the proxy works.

        Raises `Refused` if the proxy does not accept this batch, and `Unavailable` if the same
        batch can succeed later. Waits at most 13 seconds.
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
            self._connection.close()  # the next request must not get the response to this one
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
        """Pushpin closes the connection after each response; other proxies keep it for a while."""
        if self._connection.sock is not None:
            readable = select.poll()  # not select(), which accepts no number above 1023
            readable.register(self._connection.sock, select.POLLIN)
            if not readable.poll(0):
                return
            self._connection.close()  # it is readable because the proxy has closed it
        self._connection.timeout = self._limits.proxy_connect
        self._connection.connect()
        self._connection.sock.settimeout(self._limits.proxy_answer)

    def close(self) -> None:
        """Close the connection. The next batch opens another one."""
        self._connection.close()

    def authorization(self) -> dict[str, str]:
        """The header as in gripcontrol: a signed token if there is an issuer, else the key."""
        if not self._key:
            return {}
        if not self._issuer:
            key = self._key if isinstance(self._key, str) else self._key.decode("latin-1")
            # Other bytes are not a token. They are a key of Pushpin, which requires no token.
            return {"Authorization": f"Bearer {key}"} if _BEARER.fullmatch(key) else {}
        renew_at, token = self._token
        now = time.time()
        if now >= renew_at:
            token = jwt.encode({"iss": self._issuer, "exp": int(now) + _TOKEN_SECONDS}, self._key)
            self._token = (now + _TOKEN_SECONDS / 2, token)
        return {"Authorization": f"Bearer {token}"}
