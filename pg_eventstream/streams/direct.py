"""Streams from this process to clients (ASGI), without a proxy."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, TypeVar

from asgiref.sync import SyncToAsync, sync_to_async
from django.db import connections
from django.http import StreamingHttpResponse

from .. import instruments, sse
from ..conf import conf
from ..errors import EventPermissionError
from . import sockets
from .replay import is_recovery
from .shutdown import Server, server_of
from .subscription import Batch, Subscription

_T = TypeVar("_T")

# The maximum of one piece of a response, unless a single event is larger.
_PIECE_CHARACTERS = 64_000

# Some servers store in memory what the client has not read (Daphne: server.py, handle_reply). So
# after this many bytes a stream continues only if the client has received them. Otherwise it ends,
# and the client reconnects with its last id. It is more than the kernel's buffers hold, at which
# other servers wait.
_UNRECEIVED_BYTES = 16_000_000
_RECEIVING_SECONDS, _RECEIVING_LOOKS = 5, 50


def stream(
    channels: tuple[str, ...],
    after: Mapping[str, int],
    reader: str,
    check: Callable[[], None],
    scope: Mapping[str, Any],
    preface: str = "",
) -> StreamingHttpResponse:
    """A response that streams the channels to a reader until the client disconnects.

    ``check`` raises `EventPermissionError` if the reader may no longer read. ``scope`` is that of
    the request: the stream ends with the server that received it. ``preface`` is sent before the
    first event.
    """
    subscription = Subscription(channels, after, reader, check, conf.replay_age)
    pieces = _pieces(subscription, scope, preface, is_recovery(after))
    return StreamingHttpResponse(pieces, content_type=sse.CONTENT_TYPE)


async def _pieces(
    subscription: Subscription, scope: Mapping[str, Any], preface: str, recovering: bool
) -> AsyncIterator[bytes]:
    if not await _release_request():
        subscription.run = _run_in_request_thread
    server = server_of(scope)
    now = asyncio.get_running_loop().time
    ends_at = now() + (conf.max_age or math.inf)
    check_at = now() + conf.next_link_timeout
    keep_alive_at = now() + sse.KEEP_ALIVE_SECONDS
    async with subscription:
        with server.serving(subscription.end):
            opened = False
            given = 0
            instruments.streams_open.inc()
            try:
                while now() < ends_at:
                    if now() >= check_at:
                        subscription.check_again()
                        check_at = now() + conf.next_link_timeout
                    due = min(ends_at, check_at, keep_alive_at)
                    batch = await subscription.next_batch(due - now())
                    if batch.ended:
                        return
                    if batch.start is not None:
                        instruments.count_page(
                            recovering=recovering and not opened,
                            reset=bool(batch.reset),
                            missed=bool(batch.events),
                        )
                    if batch.start is not None and not opened:
                        opened = True
                        yield (preface + sse.encode_open(batch.start)).encode()
                    if batch.start is not None and batch.reset:
                        yield sse.encode_reset(batch.reset, batch.start).encode()
                    for piece in _encode(batch):
                        yield piece
                        given += len(piece)
                        if given > _UNRECEIVED_BYTES:
                            if not await _has_received(scope, server):
                                return
                            given = 0
                        keep_alive_at = now() + sse.KEEP_ALIVE_SECONDS
                    if now() >= keep_alive_at:
                        yield sse.KEEP_ALIVE.encode()
                        keep_alive_at = now() + sse.KEEP_ALIVE_SECONDS
            except EventPermissionError as e:
                if opened:
                    instruments.revocations.inc()
                yield sse.encode_error("forbidden", str(e), {"channels": e.channels}).encode()
            finally:
                instruments.streams_open.dec()


async def _has_received(scope: Mapping[str, Any], server: Server) -> bool:
    """Whether the client receives all sent bytes within a few seconds. False if unknown."""
    fd = sockets.find_connection(scope.get("client"), scope.get("server"))
    if fd is None:  # a Unix socket, or a client address that another proxy has set
        return False
    for _ in range(_RECEIVING_LOOKS):
        if server.ends:
            return False
        unsent = sockets.count_unsent(fd)
        if not unsent:
            return unsent == 0
        await asyncio.sleep(_RECEIVING_SECONDS / _RECEIVING_LOOKS)
    return False


def _encode(batch: Batch) -> Iterator[bytes]:
    """Yield the events in pieces of bounded size. Each one is sent before the next is made."""
    parts: list[str] = []
    size = 0
    for event, event_id in batch.events:
        part = event.encode(event_id if event.reliable else None)
        parts.append(part)
        size += len(part)
        if size > _PIECE_CHARACTERS:
            yield "".join(parts).encode()
            parts, size = [], 0
    if size:
        yield "".join(parts).encode()


async def _release_request() -> bool:
    """Release the thread and the connections of the request. Returns False in a test.

    Django runs a request's synchronous code in a separate thread, which keeps its database
    connections until the response ends; a stream would keep them for hours. But in a test that
    thread and its connection belong to the test, and the connection has uncommitted data of the
    test.
    """
    if await sync_to_async(_in_transaction)():
        return False
    context = SyncToAsync.thread_sensitive_context.get(None)
    thread = None if context is None else SyncToAsync.context_to_thread_executor.pop(context, None)
    if thread is not None:
        thread.submit(connections.close_all)
        thread.shutdown(wait=False)
    return True


async def _run_in_request_thread(function: Callable[[], _T]) -> _T:
    return await sync_to_async(function)()


def _in_transaction() -> bool:
    return any(connection.in_atomic_block for connection in connections.all(initialized_only=True))
