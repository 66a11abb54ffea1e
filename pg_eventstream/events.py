"""Reading events in Python: a page of them, the newest id, or all that come."""

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

    ``id`` is to go on from after this event, ``eid`` its place in its channel, from 1 on.
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
    """What `get_events` returns. Go on from ``last_event_id``, at once if there are ``more``.

    ``reset`` names the channels of which events are gone that should have come first.
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
    """The events that are kept of these channels behind an id, in commit order.

    Without an id there are none yet, only the id to go on from; ``"earliest"`` gives all that
    are kept, whatever their age. A page has at most ``limit`` events (500 at most), and not many
    more than 64 kB. With a ``user`` (None for an anonymous one) it is what this user may see:
    without events that skip them, and `EventPermissionError` is raised if they may not read a
    channel.

    Raises `InvalidRequest` if the id is none that was ever sent.
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
    """The id of the newest event of the channels, to begin a stream with.

    A page that shows a state reads the id first and the state second; a client that then
    resumes from the id gets every later event, and perhaps some that the state contains.
    The other way round it could miss one. Unreliable channels have no ids and are left out.

    An event has its id once its commit was sequenced, some milliseconds later: neither in the
    transaction that sends it nor just after that is it this one.
    """
    names = reliable(channel_names(channels))
    places, _, _ = read_channels(dict.fromkeys(names), 0)
    return sse.make_id({name: places[name].tip for name in names})


async def subscribe(
    channels: Iterable[str], after: str | None = None
) -> AsyncIterator[ReceivedEvent]:
    """Every event of these channels behind an id, then all that come, for ever.

    Each once, in commit order per channel, whatever happens to the database or to its
    connections meanwhile. ``after`` is an event's ``id``, ``"earliest"`` for all that are kept,
    None for those from now on. Store the ``id`` of an event in the transaction that handles it,
    and begin behind it the next time: then each is handled exactly once.

    No permission is checked and no event is skipped. Events of unreliable channels come with
    the id of what came before them.

    Raises `EventsPruned` if events are gone that should come next, and `InvalidRequest` if the
    id is none that was ever sent.
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
