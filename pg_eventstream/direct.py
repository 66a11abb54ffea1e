"""Streams to clients from this very process (ASGI), without a proxy."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any

from asgiref.sync import SyncToAsync, sync_to_async
from django.db import connections
from django.http import StreamingHttpResponse

from . import hub, sse
from .conf import conf
from .errors import EventPermissionError
from .hub import News
from .recovery import RecoveredEvent
from .subscription import Batch, Subscription

# What one piece of a response holds, unless a single event is larger.
_PIECE_CHARACTERS = 64_000


def stream(
    channels: tuple[str, ...], after: Mapping[str, int], reader: str, check: Callable[[], None]
) -> StreamingHttpResponse:
    """A response that streams the channels to a reader until the client leaves.

    ``check`` raises `EventPermissionError` when the reader may not go on.
    """
    pieces = _pieces(Subscription(channels, after, reader, check))
    return StreamingHttpResponse(pieces, content_type=sse.CONTENT_TYPE)


async def _pieces(subscription: Subscription) -> AsyncIterator[bytes]:
    await _let_go_of_request()
    _end_streams_with_the_process()
    now = asyncio.get_running_loop().time
    ends_at = now() + (conf.max_age or math.inf)
    check_at = now() + conf.next_link_timeout
    keep_alive_at = now() + sse.KEEP_ALIVE_SECONDS
    async with subscription:
        opened = False
        try:
            while now() < ends_at and not _process_ends:
                if now() >= check_at:
                    subscription.ask_again()
                    check_at = now() + conf.next_link_timeout
                due = min(ends_at, check_at, keep_alive_at)
                batch = await subscription.next_batch(due - now())
                if batch.ended:
                    return
                if batch.start is not None and not opened:
                    opened = True
                    yield sse.encode_open(sse.make_id(batch.start)).encode()
                if batch.start is not None and batch.reset:
                    yield sse.encode_reset(batch.reset, sse.make_id(batch.start)).encode()
                for piece in _encode(batch):
                    yield piece
                    keep_alive_at = now() + sse.KEEP_ALIVE_SECONDS
                if now() >= keep_alive_at:
                    yield sse.KEEP_ALIVE.encode()
                    keep_alive_at = now() + sse.KEEP_ALIVE_SECONDS
        except EventPermissionError as e:
            yield sse.encode_error("forbidden", str(e), {"channels": e.channels}).encode()


def _encode(batch: Batch) -> Iterator[bytes]:
    """The events, in pieces of a bounded size: each is sent before the next is made."""
    parts: list[str] = []
    size = 0
    for event, ids in batch.events:
        part = _encode_event(event, ids)
        parts.append(part)
        size += len(part)
        if size > _PIECE_CHARACTERS:
            yield "".join(parts).encode()
            parts, size = [], 0
    if parts:
        yield "".join(parts).encode()


def _encode_event(event: News | RecoveredEvent, ids: Mapping[str, int]) -> str:
    data = event.data or ""
    if not isinstance(event, News):
        return sse.encode_event(event.type, data, sse.make_id(ids))
    if not event.reliable:
        ids = {}
    elif len(ids) > 1:
        return sse.encode_event(event.type, data, sse.make_id(ids))
    # The same for all streams of this channel alone.
    if event.sse is None:
        event.sse = sse.encode_event(event.type, data, sse.make_id(ids) or None)
    return event.sse


async def _let_go_of_request() -> None:
    """Give back what a request holds until its response is over.

    Django runs a request's synchronous parts in a thread of its own, which keeps its database
    connections until then; a stream would hold them for hours.
    """
    await sync_to_async(connections.close_all)()
    context = SyncToAsync.thread_sensitive_context.get(None)
    thread = None if context is None else SyncToAsync.context_to_thread_executor.pop(context, None)
    if thread is not None:
        thread.shutdown(wait=False)


_signals_lock = threading.Lock()
_signals_are_ours = False
# Clients come back on connections that the server has not closed yet.
_process_ends = False


def _end_streams_with_the_process() -> None:
    """Servers that are told to stop wait for open responses to end; let them end at once.

    ASGI has no word for it, so this listens to the signals that stop servers, in front of the
    handlers that they have installed.
    """
    global _signals_are_ours, _process_ends
    with _signals_lock:
        if _signals_are_ours or threading.current_thread() is not threading.main_thread():
            return
        _signals_are_ours = True
    for number in (signal.SIGTERM, signal.SIGINT):
        previous = signal.getsignal(number)
        signal.signal(number, partial(_on_signal, previous))
        # Uvicorn was told before this process's first stream, and accepts for up to 0.1 s more
        # (server.py, handle_exit and main_loop).
        if getattr(getattr(previous, "__self__", None), "should_exit", False):
            _process_ends = True


def _on_signal(previous: Any, number: int, frame: FrameType | None) -> None:
    global _process_ends
    _process_ends = True
    hub.end_all()
    if callable(previous):
        previous(number, frame)
    elif previous == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
