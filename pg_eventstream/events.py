"""Reads events in Python: a page of stored events, the newest id, or a subscription."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from . import sse
from .channels import channel_names, reliable
from .errors import EventsPruned
from .permission import check_permission
from .stream_event import StreamEvent
from .streams.replay import PAGE_EVENTS, parse_start, read_channels, replay
from .streams.subscription import Subscription
from .users import user_id

if TYPE_CHECKING:
    from django.contrib.auth.models import AbstractBaseUser, AnonymousUser


@dataclass(frozen=True, slots=True)
class ReceivedEvent:
    """An event as a client receives it. ``data`` is text as it was sent; `json` parses it.

    Use ``id`` to continue after this event. ``eid`` is its number in its channel, starting at 1.
    """

    id: str
    channel: str
    eid: int
    type: str
    data: str

    def json(self) -> Any:
        return json.loads(self.data)


@dataclass(frozen=True, slots=True)
class EventPage:
    """The result of `get_events`. Continue from ``last_event_id``, at once if there are ``more``.

    ``reset`` names the channels whose next events have been pruned.
    """

    events: list[ReceivedEvent]
    last_event_id: str
    reset: list[str]
    more: bool


def get_events(
    channels: Iterable[str],
    last_event_id: str | None = None,
    limit: int = 100,
    user: AbstractBaseUser | AnonymousUser | EllipsisType | None = ...,
) -> EventPage:
    """The stored events of these channels after an id, in commit order.

    Without an id the page has no events, only the id to continue from. ``"earliest"`` returns all
    stored events of any age. A page has at most ``limit`` events (maximum 500) and about 64 kB.
    With a ``user`` (None for an anonymous one), events that skip this user are left out, and
    `EventPermissionError` is raised if the user may not read a channel.

    Raises `InvalidRequest` if the id was never sent.
    """
    wanted = channel_names(channels)
    asked = parse_start(last_event_id, wanted)
    missed = replay({c: asked.get(c) for c in reliable(wanted)}, max(1, min(limit, PAGE_EVENTS)))
    reader = None
    if not isinstance(user, EllipsisType):
        check_permission(user, wanted)  # after reading, as in endpoint.open_stream
        reader = user_id(user)
    events = [_received(event, place.id) for event, place in missed.visible_to(reader)]
    return EventPage(events, sse.make_id(missed.end), missed.reset, missed.more)


def get_current_event_id(channels: Iterable[str]) -> str:
    """The id of the newest event of the channels, from which a stream can begin.

    A page that shows a state reads the id first and the state second. A client that then resumes
    from the id gets every later event, and possibly some that the state already contains. In the
    other order it could miss one. Unreliable channels have no ids and are left out.

    An event gets its id when its commit is sequenced, some milliseconds later. So the result does
    not include an event of the current transaction, or one that was committed just before.
    """
    names = reliable(channel_names(channels))
    places, _, _ = read_channels(dict.fromkeys(names), 0)
    return sse.make_id({name: places[name].tip for name in names})


async def subscribe(
    channels: Iterable[str], after: str | None = None
) -> AsyncIterator[ReceivedEvent]:
    """Yield every event of these channels after an id, then new events as they are sent.

    Each event is yielded once, in commit order per channel, even if the database or its connections
    fail in the meantime. ``after`` is an event's ``id``, ``"earliest"`` for all stored events, or
    None to begin now. Store the ``id`` of an event in the transaction that handles it, and begin
    after it the next time: then each event is handled exactly once.

    Permissions are not checked and no event is skipped. An event of an unreliable channel has the
    id of the reliable event before it.

    Raises `EventsPruned` if the next events have been pruned, and `InvalidRequest` if the id was
    never sent.
    """
    names = channel_names(channels)
    async with Subscription(names, parse_start(after, names)) as subscription:
        while not (batch := await subscription.next_batch()).ended:
            if batch.reset:
                raise EventsPruned(batch.reset, batch.start or "")
            for event, event_id in batch.events:
                yield _received(event, event_id)


def _received(event: StreamEvent, event_id: str) -> ReceivedEvent:
    eid = event.number % sse.INCARNATION
    return ReceivedEvent(event_id, event.channel, eid, event.type, event.data or "")
