"""Items: what is published to a proxy, as JSON, and how items are put into requests."""

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

#: How the item of a hint ends. No event ends like this, since its content ends in an empty line.
HINT = b'{"http-stream":{"action":"hint"}}}'
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of the stream that go out with one request, and their items as JSON."""

    rows: list[Row]
    items: list[bytes]

    @property
    def body(self) -> bytes:
        return b'{"items":[' + b",".join(self.items) + b"]}"


def item(row: Row, prefix: str | None = None) -> bytes:
    """The item that publishes the row, as JSON. ``prefix`` spares a look at ``GRIP_PREFIX``.

    The id lets the proxy drop a repeat; prev-id, which only reliable events have, lets it see
    a gap. No content-filters: with them a client whose channels have other filters is closed
    (Pushpin 1.36).
    """
    if isinstance(row, PermissionChange):
        return _ask_again(row)
    event = row
    if event.data is None:
        if not event.reliable:
            logger.warning(
                "an event of type %r on the unreliable channel %r is over %d bytes and is not"
                " delivered; only clients of reliable channels can fetch such an event",
                event.type, event.channel, LIMITS.event_bytes,
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
        ids += f',"prev-id":"{event.prev}"'
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


def _ask_again(change: PermissionChange) -> bytes:
    """Makes the user's streams of the channel ask the origin how to go on, which ends them.

    Unlike an item that closes them it does no harm if it is published late, or twice: the
    origin answers by what the user may read by then. The proxy sends a stream nothing while it
    waits for that answer, so no later event gets through.
    """
    # Its filter looks for the channel among the names that the session holds.
    sub = conf.grip_prefix + names.events_channel(change.channel, is_reliable(change.channel))
    return _json(
        {
            "channel": conf.grip_prefix + names.user_channel(change.user),
            "meta": {"require_sub": sub},
            "formats": {"http-stream": {"action": "hint"}},
        }
    ).encode()


def batches(rows: Iterable[Row], limits: Limits = LIMITS) -> Iterator[Batch]:
    """The rows in order, cut so that each batch stays below the proxy's limits."""
    prefix = conf.grip_prefix
    batch, size = Batch([], []), 0
    for row in rows:
        encoded = item(row, prefix)
        if len(encoded) > limits.batch_bytes and isinstance(row, StreamEvent):
            encoded = hint(row.channel, row.reliable)  # control characters grow six-fold in JSON
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
