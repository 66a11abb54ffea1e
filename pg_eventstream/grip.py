"""A GRIP proxy as the publisher sees it: items, batches, and the POST that takes them.

pubcontrol's own client is not used for the POST: it has no timeout, repeats POSTs
blindly, and goes on after a batch that failed.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import jwt
import urllib3
from gripcontrol import HttpStreamFormat
from pubcontrol import Item

from . import hold, sse
from .conf import conf

# Pushpin refuses a body over 1,000,000 bytes (src/handler/handlerengine.cpp).
BATCH_BYTES = 900_000
BATCH_ITEMS = 100
#: A larger event reaches clients by way of the endpoint; the proxy gets a hint.
EVENT_BYTES = 400_000

_TIMEOUT = urllib3.Timeout(connect=3, read=10)
_TOKEN_SECONDS = 600


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """A sequenced event, ready to be published. ``data`` is None if it is too large."""

    position: int
    channel: str
    eid: int
    type: str
    data: str | None
    skip_user_ids: list[str]


@dataclass(frozen=True, slots=True)
class Batch:
    """Events that go out with one request, and their items as JSON."""

    events: list[StreamEvent]
    items: list[bytes]

    @property
    def body(self) -> bytes:
        return b'{"items":[' + b",".join(self.items) + b"]}"


class Bursts:
    """Channels that had more events at once than a session's queue at the proxy may hold.

    For a session whose client reads slowly, or which is just fetching its next link, Pushpin
    queues 100 items and drops what follows (src/handler/httpsession.cpp, PUBLISH_QUEUE_MAX).
    The channel's next event shows the gap, and the session fetches what it missed. But after
    a burst there may be none for long, so a hint takes its place: soon, and once more for
    those whose queue was still full.
    """

    _MANY, _WINDOW_SECONDS, _HINT_AFTER = 50, 1.0, (0.5, 5.0)

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._window_end = 0.0
        self._due: dict[str, list[float]] = {}

    def note(self, channels: Sequence[str], now: float) -> None:
        """Events were published on these channels, one entry for each."""
        if now >= self._window_end:
            self._counts.clear()
            self._window_end = now + self._WINDOW_SECONDS
        self._counts.update(channels)
        for channel in set(channels):
            if self._counts[channel] >= self._MANY:
                self._due[channel] = [now + seconds for seconds in self._HINT_AFTER]

    def next_due(self) -> float | None:
        """When the next hint is due, None if there is none to come."""
        return min((times[0] for times in self._due.values()), default=None)

    def take_due(self, now: float) -> list[str]:
        """The channels that need a hint now."""
        due = [channel for channel, times in self._due.items() if times[0] <= now]
        for channel in due:
            del self._due[channel][0]
            if not self._due[channel]:
                del self._due[channel]
        return due


class Refused(Exception):
    """The proxy refused the request, and will refuse it again."""


class Unavailable(Exception):
    """The proxy could not be reached, or not take the request now."""


def item(event: StreamEvent) -> bytes:
    """The item that publishes the event, as JSON.

    prev-id lets the proxy see a gap; the id lets it drop a repeat. No content-filters:
    with them a client whose channels have other filters is closed (Pushpin 1.36).
    """
    if event.data is None:
        return hint(event.channel)
    own_id = hold.escape(f"{sse.quote_channel(event.channel)}:{event.eid}")
    content = sse.encode_event(
        hold.escape(event.type), hold.escape(event.data), event_id=f"{own_id}%I"
    )
    skipped = ",".join(map(hold.quote_user, event.skip_user_ids))
    meta = {"skip_users": skipped} if skipped else {}
    return _dump(
        event.channel,
        Item(
            HttpStreamFormat(content),
            id=str(event.eid),
            prev_id=str(event.eid - 1),
            meta=meta,
        ),
    )


def hint(channel: str) -> bytes:
    """Tells the proxy that there is news on the channel, which its streams then fetch.

    Without id and prev-id: with them, the proxy would take the event as delivered.
    """
    return _dump(channel, Item(HttpStreamFormat(action="hint")))


def _dump(channel: str, grip_item: Any) -> bytes:
    exported = grip_item.export(formats_field=True)
    exported["channel"] = conf.grip_prefix + hold.events_channel(channel)
    return json.dumps(exported, ensure_ascii=False, separators=(",", ":")).encode()


def batches(events: Iterable[StreamEvent]) -> Iterator[Batch]:
    """The events in order, cut so that each batch stays below the proxy's limits."""
    batch, size = Batch([], []), 0
    for event in events:
        encoded = item(event)
        if len(encoded) > BATCH_BYTES:  # control characters grow six-fold in JSON
            encoded = hint(event.channel)
        if batch.items and (
            len(batch.items) == BATCH_ITEMS or size + len(encoded) + 1 > BATCH_BYTES
        ):
            yield batch
            batch, size = Batch([], []), 0
        batch.events.append(event)
        batch.items.append(encoded)
        size += len(encoded) + 1
    if batch.items:
        yield batch


class Proxy:
    """One proxy's control endpoint. Used by one thread."""

    def __init__(self, config: dict[str, Any]) -> None:
        uri = urlsplit(config["control_uri"])
        #: Its name in the database and in logs: without credentials.
        self.name = urlunsplit(
            (uri.scheme, uri.netloc.rpartition("@")[2], uri.path.rstrip("/"), "", "")
        )
        self._url = urlunsplit(uri._replace(path=f"{uri.path.rstrip('/')}/publish/"))
        self._issuer = config.get("control_iss")
        self._key = config.get("key")
        self._token: tuple[float, str] = (0.0, "")
        self._http = urllib3.PoolManager(retries=False, timeout=_TIMEOUT)

    def post(self, body: bytes) -> None:
        """Publish a batch: all of it or nothing.

        Raises `Refused` if the proxy finds fault with the batch itself, `Unavailable` if
        the same batch may succeed later. Takes 13 seconds at most.
        """
        headers = {"Content-Type": "application/json", **self._authorization()}
        try:
            response = self._http.request(
                "POST", self._url, body=body, headers=headers, redirect=False
            )
        except urllib3.exceptions.HTTPError as e:
            raise Unavailable(f"cannot be reached: {e}") from e
        if 200 <= response.status < 300:
            return
        text = response.data[:300].decode(errors="replace").strip()
        message = f"answered {response.status}: {text}"
        if response.status in (400, 413):
            raise Refused(message)
        if response.status in (401, 403):
            message += " - check iss and key in GRIP_URL"
        elif response.status == 404:
            message += " - check the path in GRIP_URL"
        raise Unavailable(message)

    def _authorization(self) -> dict[str, str]:
        """As gripcontrol does: a signed token if there is an issuer, else the key itself."""
        if not self._key:
            return {}
        if not self._issuer:
            key = self._key.decode() if isinstance(self._key, bytes) else self._key
            return {"Authorization": f"Bearer {key}"}
        renew_at, token = self._token
        now = time.time()
        if now >= renew_at:
            token = jwt.encode({"iss": self._issuer, "exp": int(now) + _TOKEN_SECONDS}, self._key)
            self._token = (now + _TOKEN_SECONDS / 2, token)
        return {"Authorization": f"Bearer {token}"}
