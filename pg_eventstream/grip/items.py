"""Items: what is published to a proxy, as JSON, and how items are put into requests."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .. import permission, sse
from ..conf import conf
from . import names

logger = logging.getLogger(__name__)

# Pushpin refuses a body over 1,000,000 bytes (src/handler/handlerengine.cpp).
BATCH_BYTES = 900_000
BATCH_ITEMS = 100
#: A larger event reaches clients by way of the endpoint; the proxy gets a hint.
EVENT_BYTES = 400_000
#: How the item of a hint ends. No event ends like this, since its content ends in an empty line.
HINT = b'{"http-stream":{"action":"hint"}}}'
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
    event_type, data = names.escape(event.type), names.escape(event.data)
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
    skipped = ",".join(map(names.quote_user, event.skip_user_ids))
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
        _json(prefix + names.events_channel(channel, reliable)),
        names.escape(sse.quote_channel(channel)),
    )


def hint(channel: str, reliable: bool = True) -> bytes:
    """Tells the proxy that there is news on the channel, which its streams then fetch.

    Without id and prev-id: with them, the proxy would take the event as delivered.
    """
    grip_channel, _ = _names(conf.grip_prefix, channel, reliable)
    return f'{{"channel":{grip_channel},"formats":'.encode() + HINT


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
    sub = conf.grip_prefix + names.events_channel(channel, permission.is_reliable(channel))
    return _json(
        {
            "channel": conf.grip_prefix + names.user_channel(user),
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
