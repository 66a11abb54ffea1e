"""What opens must resume: refuses at opening the streams that could not.

To resume, a client repeats its request with an id. To go on, the proxy asks at the next link, in
whose path all names stand. Servers and proxies take no heads of any length, and what answers then
is not this application.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote

from django.http import HttpRequest

from .. import sse
from ..errors import InvalidRequest

# Pushpin takes as much (client_buffer_size); the servers beside, daphne and hypercorn for
# instance, twice that or more.
_PROXY_HEAD_BYTES, _SERVER_HEAD_BYTES = 8192, 16384
# gunicorn takes a request line of 4094 bytes. When a client is behind by several pages, the link
# also has the ids of the channels: 18 digits and a comma, as base64.
_LINK_BYTES = 4094 - len("GET  HTTP/1.1\r\n")
_LINK_ID_BYTES = 26
_LONGEST_ID = 10**18 - 1


def check_link(link: str, channels: Iterable[str]) -> None:
    """Raise `InvalidRequest` if the link is too long for the proxy to ask at."""
    size = len(link) + sum(_LINK_ID_BYTES for _ in channels)
    if size > _LINK_BYTES:
        raise InvalidRequest(
            f"The names of these channels are too long together ({size} bytes in the address at"
            f" which the proxy asks how the stream goes on, {_LINK_BYTES} at most): use fewer"
            " channels, or shorter names"
        )


def check_head(request: HttpRequest, channels: Iterable[str], proxied: bool) -> None:
    """Raise `InvalidRequest` if there is no room in the request for an id to resume from."""
    # In the query, as a browser client may send it, an id is percent-encoded once more.
    parts = [len(quote(f"{sse.make_id({channel: _LONGEST_ID})},", safe="")) for channel in channels]
    # Behind a proxy the id of an event begins with the part of its own channel once more.
    size = _head_bytes(request) + len("Last-Event-ID: \r\n") + sum(parts) + max(parts)
    most = _PROXY_HEAD_BYTES if proxied else _SERVER_HEAD_BYTES
    if size > most:
        raise InvalidRequest(
            f"The request is too long to be resumed (with an id {size} bytes of address, cookies"
            f" and other headers, {most} at most): use fewer channels, shorter names or cookies"
        )


def _head_bytes(request: HttpRequest) -> int:
    """Of the client's own request, without an id and without what the proxy adds."""
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
