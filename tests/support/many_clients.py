"""Many streams of one channel, read by one event loop."""

from __future__ import annotations

import asyncio
from types import TracebackType
from urllib.parse import urlsplit


class ManyClients:
    """Opens streams and records the id and the data of each event on each of them."""

    def __init__(self, url: str, channel: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._request = f"GET {parts.path}?channel={channel} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        self.received: list[list[tuple[str, str]]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()

    async def __aenter__(self) -> ManyClients:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def open(self, count: int) -> None:
        """Open more streams, twenty at a time. Returns when the server has opened all of them."""
        for _ in range(0, count, 20):
            opened = [asyncio.Event() for _ in range(min(20, count))]
            for event in opened:
                self._tasks.append(asyncio.create_task(self._read(event)))
            await asyncio.wait_for(asyncio.gather(*(event.wait() for event in opened)), 60)
            count -= 20

    async def wait_count(self, count: int, timeout: float = 60) -> None:
        """Wait until every stream has received ``count`` events."""

        async def all_there() -> None:
            while any(len(events) < count for events in self.received):
                self._changed.clear()
                await self._changed.wait()

        await asyncio.wait_for(all_there(), timeout)

    async def _read(self, opened: asyncio.Event) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        events: list[tuple[str, str]] = []
        self.received.append(events)
        event_type = event_id = ""
        try:
            writer.write(self._request)
            while line := await reader.readline():
                name, _, value = line.decode().rstrip("\r\n").partition(": ")
                if name == "event":
                    event_type = value
                elif name == "id":
                    event_id = value
                elif name.startswith("data"):
                    if event_type == "stream-open":
                        opened.set()
                    elif event_type != "keep-alive":
                        events.append((event_id, value))
                        self._changed.set()
        finally:
            writer.close()
