"""Follows channels from a place in the stream: first the missed events, then new ones.

Events that are read from the database and new ones join without a gap or a repeat, because eids are
dense. A slow subscription reads from the database again, so that no event is lost and memory stays
bounded.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Protocol, TypeVar

from django.db import Error

from .. import sse
from ..backoff import Backoff
from ..channelmanager import get_channelmanager
from ..channels import reliable
from ..conf import conf
from ..postgres.threads import arun
from ..stream_event import PermissionChange, Row, StreamEvent
from .hub import hub_of
from .replay import Page, replay

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# The queue in memory of a slow subscription. If it is full, events are read from the database.
_QUEUE_EVENTS, _QUEUE_BYTES = 250, 500_000
_RETRY_SECONDS = (0.1, 5.0)


@dataclass(frozen=True, slots=True)
class Batch:
    """Events, each with the id after it. It is empty after a timeout.

    ``reset`` names the channels whose next events are gone. ``start`` is set if the events were
    read from the database, and is the id before the first one. ``ended`` is set after
    `Subscription.end`.
    """

    events: list[tuple[StreamEvent, str]] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)
    start: str | None = None
    ended: bool = False


class Run(Protocol):
    async def __call__(self, function: Callable[[], _T]) -> _T: ...


class Subscription:
    """One reader of some channels. It is an async context manager.

    `next_batch` waits for the next events. It can be cancelled without losing any.

    ``reader`` is the user id of the reader: events that skip this user are left out, and ``check``
    is called in a thread before the reader gets events that could have been sent after a change of
    its permissions. `next_batch` raises the exceptions of ``check``.

    ``max_age`` is the maximum age of the first event.

    Raises `ImproperlyConfigured` if a setting has an invalid number.
    """

    def __init__(
        self,
        channels: tuple[str, ...],
        after: Mapping[str, int],
        reader: str | None = None,
        check: Callable[[], None] = lambda: None,
        max_age: timedelta | None = None,
    ) -> None:
        conf.check_numbers()  # before anything is sent
        get_channelmanager()
        self.channels = channels
        self._after = after
        self._reader = reader
        self._check = check
        self._max_age = max_age
        #: Calls functions that read the database.
        self.run: Run = arun
        self._hub = hub_of(conf.database)
        self._place: sse.Place | None = None  # in the reliable channels
        self._queue: deque[Row] = deque()
        self._queued_bytes = 0
        self._behind = True
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Subscription:
        # Before the existing rows are read, so that no row is missed in between.
        self._hub.add(self, self._reader)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hub.discard(self)

    async def next_batch(self, timeout: float | None = None) -> Batch:
        """The next events as soon as there are any, or an empty batch after ``timeout`` seconds."""
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        backoff = Backoff(*_RETRY_SECONDS)
        while not self._ended:
            if not self._hub.has_begun:
                if not await self._wait(deadline):
                    return Batch()
            elif self._behind or self._queue:
                try:
                    if self._behind:
                        return await self._read()
                    if events := await self._take():
                        return Batch(events)
                except Error as e:
                    logger.warning(
                        "stream: database: %s; trying again",
                        e,
                        extra={"event": "database-lost", "part": "stream"},
                    )
                    if not await self._wait(deadline, backoff.next()):
                        return Batch()
            elif not await self._wait(deadline):
                return Batch()
        return Batch(ended=True)

    async def _wait(self, deadline: float | None, delay: float | None = None) -> bool:
        """Wait for an offered row, at most ``delay`` seconds. Returns False at the deadline."""
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        until = deadline
        if delay is not None:
            until = min(loop.time() + delay, deadline or math.inf)
        timer = None if until is None else loop.call_at(until, self._wake)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
        return deadline is None or loop.time() < deadline

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self) -> None:
        """End the subscription: from now on `next_batch` returns a batch that says so."""
        self._ended = True
        self._wake()

    def check_again(self) -> None:
        """Check the reader's permissions again, as if they had changed."""
        self.offer(PermissionChange(0, self._reader or "", ""))

    # Called by the hub

    def offer(self, row: Row) -> None:
        if len(self._queue) >= _QUEUE_EVENTS or self._queued_bytes >= _QUEUE_BYTES:
            self.read_again()
            return
        self._queue.append(row)
        if isinstance(row, StreamEvent):
            self._queued_bytes += len(row.data or "")
        self._wake()

    def read_again(self) -> None:
        self._queue.clear()
        self._queued_bytes = 0
        self._behind = True
        self._wake()

    # The next events

    async def _read(self) -> Batch:
        """Read the next page from the database, and check permissions after that."""
        # Rows that are offered in the meantime are queued; they can also be on the page.
        self._behind = False
        try:
            missed = await self.run(self._replay)
        except BaseException:
            self._behind = True
            raise
        self._place = sse.Place(missed.end)
        self._behind = self._behind or missed.more
        events = [(event, place.id) for event, place in missed.visible_to(self._reader)]
        return Batch(events, missed.reset, sse.make_id(missed.start))

    def _replay(self) -> Page:
        first = self._place is None
        numbers = self._after if self._place is None else self._place.numbers
        missed = replay(
            {channel: numbers.get(channel) for channel in reliable(self.channels)},
            max_age=self._max_age if first else None,
        )
        self._check()
        return missed

    async def _take(self) -> list[tuple[StreamEvent, str]]:
        """Take the queued events, up to a permission change or a gap."""
        events: list[tuple[StreamEvent, str]] = []
        place = self._place or sse.Place({})
        while self._queue:
            row = self._queue[0]
            if isinstance(row, PermissionChange):
                if events:
                    break
                await self.run(self._check)
                if self._behind:  # the queue was cleared in the meantime
                    break
                self._queue.popleft()
                continue
            self._queue.popleft()
            self._queued_bytes -= len(row.data or "")
            if row.reliable:
                at = place.numbers.get(row.channel, row.number)
                if row.number % sse.INCARNATION <= at % sse.INCARNATION:
                    continue  # it was on a page
                if row.prev != at or row.data is None:
                    self._behind = True
                    break
                place.move(row.channel, row.number)
            if row.data is not None and self._reader not in row.skip_user_ids:
                events.append((row, place.id))
        return events
