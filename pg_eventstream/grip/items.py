"""Encodes rows of the stream as items for a proxy, and collects them into batches."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from .. import sse
from ..channels import is_reliable
from ..conf import conf
from ..limits import LIMITS, Limits
from ..stream_event import PermissionChange, Row, StreamEvent
from . import names

logger = logging.getLogger(__name__)

#: The end of a hint's item. No event's item ends like this, because its content ends in an empty
#: line.
HINT = b'{"http-stream":{"action":"hint"}}}'
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of the stream that one request publishes, and their items as JSON."""

    rows: list[Row]
    items: list[bytes]

    @property
    def body(self) -> bytes:
        return b'{"items":[' + b",".join(self.items) + b"]}"


def item(row: Row, prefix: str | None = None) -> bytes:
    """The item that publishes the row, as JSON. ``prefix`` saves reading ``GRIP_PREFIX``.

    The id lets the proxy drop repeated items. The prev-id, which only reliable events have, lets it
    detect gaps. There are no content-filters, with which Pushpin 1.36 closes clients whose channels
    have other filters.
    """
    if isinstance(row, PermissionChange):
        return _hint_to_user(row)
    event = row
    if event.data is None:
        if not event.reliable:
            logger.warning(
                "an event of type %r on the unreliable channel %r is larger than %d bytes and is"
                " not delivered; only clients of reliable channels can fetch such an event",
                event.type, event.channel, LIMITS.event_bytes,
                extra={"event": "event-too-large", "channel": event.channel},
            )  # fmt: skip
        return hint(event.channel, event.reliable)
    event_type, data = names.escape(event.type), names.escape(event.data)
    if prefix is None:
        prefix = conf.grip_prefix
    grip_channel, own_id = _names(prefix, event.channel, event.reliable)
    if event.type in sse.RESERVED_TYPES:  # older versions of the table accepted them
        content = ":\n"
    elif event.reliable:
        content = sse.encode_event(event_type, data, event_id=f"{own_id}:{event.number}%I")
    else:
        content = sse.encode_event(event_type, data)
    ids = f'"id":"{event.number}"'
    if event.reliable:
        ids += f',"prev-id":"{event.prev}"'
    skipped = ",".join(map(names.quote_user, event.skip_user_ids))
    meta = f',"meta":{_json({"skip_users": skipped})}' if skipped else ""
    # Without pubcontrol's Item, because a publisher spends most of its time here.
    return (
        f'{{"channel":{grip_channel},{ids}{meta},'
        f'"formats":{{"http-stream":{{"content":{_json(content)}}}}}}}'
    ).encode()


@lru_cache(maxsize=1000)
def _names(prefix: str, channel: str, reliable: bool) -> tuple[str, str]:
    """The GRIP channel of a channel as JSON, and the beginning of its events' ids."""
    return (
        _json(prefix + names.events_channel(channel, reliable)),
        names.escape(sse.quote_channel(channel)),
    )


def hint(channel: str, reliable: bool = True) -> bytes:
    """The item that makes the streams of a channel fetch new events from the endpoint.

    It has no id and prev-id, because with them the proxy would count the event as delivered.
    """
    grip_channel, _ = _names(conf.grip_prefix, channel, reliable)
    return f'{{"channel":{grip_channel},"formats":'.encode() + HINT


def _hint_to_user(change: PermissionChange) -> bytes:
    """The item that makes the user's streams of the channel request their next link.

    The response ends them if the user may no longer read. Unlike an item that closes streams, this
    one is harmless if it is published late or twice, because the response depends on the user's
    permissions at that time. The proxy sends nothing to a stream while it waits for the response,
    so no later event gets through.
    """
    # Its filter looks for the channel among the channels of the stream.
    sub = conf.grip_prefix + names.events_channel(change.channel, is_reliable(change.channel))
    return _json(
        {
            "channel": conf.grip_prefix + names.user_channel(change.user),
            "meta": {"require_sub": sub},
            "formats": {"http-stream": {"action": "hint"}},
        }
    ).encode()


def batches(rows: Iterable[Row], limits: Limits = LIMITS) -> Iterator[Batch]:
    """Yield the rows in order, in batches within the proxy's limits."""
    prefix = conf.grip_prefix
    batch, size = Batch([], []), 0
    for row in rows:
        encoded = item(row, prefix)
        if len(encoded) > limits.batch_bytes and isinstance(row, StreamEvent):
            encoded = hint(row.channel, row.reliable)  # a control character takes 6 bytes in JSON
        if batch.items and (
            len(batch.items) == limits.batch_items or size + len(encoded) + 1 > limits.batch_bytes
        ):
            yield batch
            batch, size = Batch([], []), 0
        batch.rows.append(row)
        batch.items.append(encoded)
        size += len(encoded) + 1
    if batch.items:
        yield batch
