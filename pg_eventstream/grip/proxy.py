"""A GRIP proxy as the publisher sees it: items, batches, and the POST that takes them.

pubcontrol's own client is not used for the POST: it has no timeout, repeats POSTs
blindly, and goes on after a batch that failed.
"""

from __future__ import annotations

import heapq
import http.client
import json
import logging
import re
import select
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import jwt
from django.core.exceptions import ImproperlyConfigured

from .. import permission, sse
from ..conf import conf, proxy_name
from . import hold

logger = logging.getLogger(__name__)

# Pushpin refuses a body over 1,000,000 bytes (src/handler/handlerengine.cpp).
BATCH_BYTES = 900_000
BATCH_ITEMS = 100
#: A larger event reaches clients by way of the endpoint; the proxy gets a hint.
EVENT_BYTES = 400_000

_CONNECT_SECONDS, _ANSWER_SECONDS = 3, 10
_TOKEN_SECONDS = 600
_BEARER = re.compile("[!-~]+")
# How no event ends: its content ends in an empty line.
_HINT = b'{"http-stream":{"action":"hint"}}}'
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class StreamEvent(NamedTuple):
    """A sequenced event, ready to be published. ``data`` is None if it is too large.

    ``number`` is what its id shows. ``prev`` is what that of the event before it shows, None for
    one less: only the first event of a channel in an incarnation of the stream says otherwise.
    """

    position: int
    channel: str
    number: int
    type: str
    data: str | None
    skip_user_ids: list[str]
    reliable: bool = True
    prev: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Events that go out with one request, and their items as JSON."""

    events: list[StreamEvent]
    items: list[bytes]

    @property
    def body(self) -> bytes:
        return b'{"items":[' + b",".join(self.items) + b"]}"


class Hints:
    """Hints that are to follow what was published: soon, and once more a little later.

    After a burst: for a session whose client reads slowly, or which is just fetching its next
    link, Pushpin queues 100 items and drops what follows (src/handler/httpsession.cpp,
    PUBLISH_QUEUE_MAX). The channel's next event shows the gap, and the session fetches what it
    missed; but there may be none for long, so a hint takes its place. An event in time puts it
    off, since a stream sends nothing while it fetches (for up to 0.1 s).

    After a change of permission: a stream that was just being opened may have been allowed
    before the change, and held after its hint was published.

    After an event in whose place a hint was published: a stream that was just being opened, or
    fetching its next link, may have been read before the event, and held after the hint.

    After the first event of a channel in an incarnation of the stream: a stream that holds an id
    which is lost would otherwise get its reset only when the proxy gives up waiting for what comes
    before the event, after 5 seconds (src/handler/sequencer.cpp).
    """

    MANY, _WINDOW_SECONDS, _AFTER = 50, 1.0, (0.5, 5.0)

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._window_end = 0.0
        #: When the next one is due, and how many there were.
        self._due: dict[bytes, tuple[float, int]] = {}
        #: The same in the order of time. Those that were put off stand at their old place as well.
        self._queue: list[tuple[float, bytes]] = []

    def note(self, batch: Batch, now: float) -> None:
        """These events were published."""
        if now >= self._window_end:
            self._counts.clear()
            self._window_end = now + self._WINDOW_SECONDS
        channels = set()
        for event, encoded in zip(batch.events, batch.items, strict=True):
            if event.channel == permission.CHANGES:
                self.follow(encoded, now)
            elif event.reliable:
                self._counts[event.channel] += 1
                channels.add(event.channel)
                if encoded.endswith(_HINT):
                    self.follow(encoded, now)
                elif event.prev is not None:
                    self.follow(hint(event.channel), now)
        for channel in channels:
            encoded = hint(channel)
            if self._counts[channel] >= self.MANY:
                self.follow(encoded, now)
            elif encoded in self._due:
                self._put_off(encoded, now)

    def follow(self, encoded: bytes, now: float) -> None:
        """This hint is to follow, as it does by itself what `note` finds to need one."""
        self._set(encoded, now + self._AFTER[0], 0)

    def _put_off(self, encoded: bytes, now: float) -> None:
        at, done = self._due[encoded]
        pause = self._AFTER[done] - (self._AFTER[done - 1] if done else 0)
        self._set(encoded, max(at, now + pause), done)

    def _set(self, encoded: bytes, at: float, done: int) -> None:
        self._due[encoded] = (at, done)
        heapq.heappush(self._queue, (at, encoded))

    def next_due(self) -> float | None:
        """When the next hint is due, None if there is none to come."""
        while self._queue:
            at, encoded = self._queue[0]
            if encoded in self._due and self._due[encoded][0] == at:
                return at
            heapq.heappop(self._queue)
        return None

    def take_due(self, now: float) -> list[bytes]:
        """The items of the hints that are due now."""
        due = []
        while (at := self.next_due()) is not None and at <= now:
            _, encoded = heapq.heappop(self._queue)
            due.append((encoded, *self._due.pop(encoded)))
        for encoded, at, done in due:
            if done + 1 < len(self._AFTER):
                self._set(encoded, at + self._AFTER[done + 1] - self._AFTER[done], done + 1)
        return [encoded for encoded, _, _ in due]


class Refused(Exception):
    """The proxy refused the request, and will refuse it again."""


class Unavailable(Exception):
    """The proxy could not be reached, or not take the request now."""


def item(event: StreamEvent, prefix: str | None = None) -> bytes:
    """The item that publishes the event, as JSON. ``prefix`` spares a look at ``GRIP_PREFIX``.

    The id lets the proxy drop a repeat; prev-id, which only reliable events have, lets it see
    a gap. No content-filters: with them a client whose channels have other filters is closed
    (Pushpin 1.36).
    """
    if event.channel == permission.CHANGES:
        return _ask_again(event)
    if event.data is None:
        if not event.reliable:
            logger.warning(
                "an event of type %r on the unreliable channel %r is over %d bytes and is not"
                " delivered; only clients of reliable channels can fetch such an event",
                event.type, event.channel, EVENT_BYTES,
            )  # fmt: skip
        return hint(event.channel, event.reliable)
    event_type, data = hold.escape(event.type), hold.escape(event.data)
    if prefix is None:
        prefix = conf.grip_prefix
    grip_channel, own_id = _names(prefix, event.channel, event.reliable)
    if event.type in sse.RESERVED_TYPES:  # from before the table refused them
        content = ":\n"
    elif event.reliable:
        content = sse.encode_event(event_type, data, event_id=f"{own_id}:{event.number}%I")
    else:
        content = sse.encode_event(event_type, data)
    ids = f'"id":"{event.number}"'
    if event.reliable:
        ids += f',"prev-id":"{event.number - 1 if event.prev is None else event.prev}"'
    skipped = ",".join(map(hold.quote_user, event.skip_user_ids))
    meta = f',"meta":{_json({"skip_users": skipped})}' if skipped else ""
    # By hand and not with pubcontrol's Item, for a publisher does little else than this.
    return (
        f'{{"channel":{grip_channel},{ids}{meta},'
        f'"formats":{{"http-stream":{{"content":{_json(content)}}}}}}}'
    ).encode()


@lru_cache(maxsize=1000)
def _names(prefix: str, channel: str, reliable: bool) -> tuple[str, str]:
    """The GRIP channel of a channel, as JSON, and how the ids of its events begin."""
    return (
        _json(prefix + hold.events_channel(channel, reliable)),
        hold.escape(sse.quote_channel(channel)),
    )


def hint(channel: str, reliable: bool = True) -> bytes:
    """Tells the proxy that there is news on the channel, which its streams then fetch.

    Without id and prev-id: with them, the proxy would take the event as delivered.
    """
    grip_channel, _ = _names(conf.grip_prefix, channel, reliable)
    return f'{{"channel":{grip_channel},"formats":'.encode() + _HINT


def _ask_again(event: StreamEvent) -> bytes:
    """Makes the user's streams of the channel ask the origin how to go on, which ends them.

    Unlike an item that closes them it does no harm if it is published late, or twice: the
    origin answers by what the user may read by then. The proxy sends a stream nothing while it
    waits for that answer, so no later event gets through.
    """
    try:
        user, channel = permission.parse_change(event.data or "")
    except ValueError as e:
        logger.error("event %d is no change of permission (%s): ignored", event.position, e)
        user = channel = ""
    # Its filter looks for the channel among the names that the session holds.
    sub = conf.grip_prefix + hold.events_channel(channel, permission.is_reliable(channel))
    return _json(
        {
            "channel": conf.grip_prefix + hold.user_channel(user),
            "meta": {"require_sub": sub},
            "formats": {"http-stream": {"action": "hint"}},
        }
    ).encode()


def batches(events: Iterable[StreamEvent]) -> Iterator[Batch]:
    """The events in order, cut so that each batch stays below the proxy's limits."""
    prefix = conf.grip_prefix
    batch, size = Batch([], []), 0
    for event in events:
        encoded = item(event, prefix)
        if len(encoded) > BATCH_BYTES:  # control characters grow six-fold in JSON
            encoded = hint(event.channel, event.reliable)
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
        uri = urlsplit(str(config.get("control_uri", "")))
        if uri.scheme not in ("http", "https"):
            raise ImproperlyConfigured(
                f"The address of a proxy (GRIP_URL, control_uri in GRIP_PROXIES) must begin with"
                f" http:// or https://; it is {uri.geturl()!r}."
            )
        self.name = proxy_name(config)
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
        self._connection.timeout = _CONNECT_SECONDS
        self._connection.connect()
        self._connection.sock.settimeout(_ANSWER_SECONDS)

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
