"""Refuses to open streams that could not be resumed, because a request would be too long.

To resume, a client repeats its request with an id. To continue, the proxy requests the next link,
whose path contains all channel names. Servers and proxies limit the length of the request line and
headers, and would refuse such a request before it reaches this application.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote

from django.http import HttpRequest

from .. import sse
from ..errors import InvalidRequest

# Pushpin's limit (client_buffer_size), and the lowest limit of application servers: daphne and
# hypercorn accept this or more.
_PROXY_HEAD_BYTES, _SERVER_HEAD_BYTES = 8192, 16384
# gunicorn accepts a request line of 4094 bytes. If a client has missed several pages, the link also
# contains the ids of the channels: 18 digits and a comma each, in base64.
_LINK_BYTES = 4094 - len("GET  HTTP/1.1\r\n")
_LINK_ID_BYTES = 26
_LONGEST_ID = 10**18 - 1


def check_link(link: str, channels: Iterable[str]) -> None:
    """Raise `InvalidRequest` if the link is too long for a request of the proxy."""
    size = len(link) + sum(_LINK_ID_BYTES for _ in channels)
    if size > _LINK_BYTES:
        raise InvalidRequest(
            f"The names of these channels are too long together ({size} bytes in the URL at which"
            f" the proxy asks how to continue the stream; the maximum is {_LINK_BYTES}): use fewer"
            " channels or shorter names"
        )


def check_head(request: HttpRequest, channels: Iterable[str], proxied: bool) -> None:
    """Raise `InvalidRequest` if there is no room in the request for an id to resume from."""
    # In the query, where a browser client can send it, an id is percent-encoded once more.
    parts = [len(quote(f"{sse.make_id({channel: _LONGEST_ID})},", safe="")) for channel in channels]
    # Behind a proxy, the id of an event contains the part of its own channel twice.
    size = _head_bytes(request) + len("Last-Event-ID: \r\n") + sum(parts) + max(parts)
    most = _PROXY_HEAD_BYTES if proxied else _SERVER_HEAD_BYTES
    if size > most:
        raise InvalidRequest(
            f"The request is too long to be resumed (with an id, {size} bytes of URL, cookies and"
            f" other headers; the maximum is {most}): use fewer channels, shorter names or cookies"
        )


def _head_bytes(request: HttpRequest) -> int:
    """The size of the client's own request, without an id and without the proxy's headers."""
    path, _, query = request.get_full_path().partition("?")
    pairs = [pair for pair in query.split("&") if not pair.startswith("lastEventId=")]
    lines = [
        f"GET {path}?{'&'.join(pairs)} HTTP/1.1",
        *(
            f"{name}: {value}"
            for name, value in request.headers.items()
            if name != "Last-Event-Id" and not name.startswith("Grip-")
        ),
        "",
    ]
    return sum(len(line) + len("\r\n") for line in lines)
