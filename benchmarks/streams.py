"""Many streams of the benchmarks' project, read by one event loop that does little else."""

from __future__ import annotations

import asyncio
import re
import time
from array import array
from types import TracebackType

_EVENT = re.compile(rb'data: \{"n": (\d+),[^\n]*\n')


class _Stream(asyncio.Protocol):
    """One stream: the numbers of its events in the order of arrival, and their times."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._rest = b""
        self.opened = asyncio.get_running_loop().create_future()
        self.numbers = array("q")
        self.times = array("d")
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._streams.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self.opened.done():
            self._rest += data
            if b"event: stream-open\n" not in self._rest:
                return
            self.opened.set_result(None)
            data = b""
        data = self._rest + data
        end = 0
        for match in _EVENT.finditer(data):
            self.numbers.append(int(match[1]))
            self.times.append(now)
            end = match.end()
        # The chunks of the transfer encoding do not split events, but those of the network do.
        self._rest = data[end:] if end else data[-100_000:]
        if end:
            self._streams.last_time = now
            if self.numbers[-1] == self._streams.last_number:
                self._streams.finished += 1
                self._streams.changed.set()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(f"refused: {self._rest[:200]!r}"))


class Streams:
    """An async context manager for ``count`` open streams."""

    def __init__(self, port: int, count: int, channel: str = "room", version: str = "1.1") -> None:
        self._port, self._count = port, count
        self.request = (
            f"GET /events/?channel={channel} HTTP/{version}\r\nHost: localhost\r\n\r\n".encode()
        )
        self.streams: list[_Stream] = []
        self.last_number = 0
        self.last_time = 0.0
        self.finished = 0
        self.changed = asyncio.Event()

    async def __aenter__(self) -> Streams:
        deadline = time.monotonic() + 10
        while len(self.streams) < self._count:
            try:
                await self._open(min(25, self._count - len(self.streams)))
            except ConnectionError:  # Pushpin refuses requests while it starts
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)
        return self

    async def _open(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        fresh = [
            (await loop.create_connection(lambda: _Stream(self), "127.0.0.1", self._port))[1]
            for _ in range(count)
        ]
        try:
            await asyncio.wait_for(asyncio.gather(*(stream.opened for stream in fresh)), 120)
        except ConnectionError:
            for stream in fresh:
                stream.transport.abort()
            raise
        self.streams += fresh

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for stream in self.streams:
            stream.transport.abort()

    def expect(self, last_number: int) -> None:
        """Forget the events that have arrived, and expect this number as the last."""
        self.last_number = last_number
        self.finished = 0
        for stream in self.streams:
            del stream.numbers[:], stream.times[:]

    async def wait(self, patience: float = 15.0) -> None:
        """Wait until each stream has the last number, or nothing arrives for ``patience`` s."""
        while self.finished < len(self.streams):
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), patience)
            except asyncio.TimeoutError:  # before Python 3.11 not the same
                if time.monotonic() - self.last_time > patience:
                    return
