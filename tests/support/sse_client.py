"""An SSE client that records what it received. It parses the stream as a browser does."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import quote, urlencode, urlsplit

from pg_eventstream import sse


def eids_of(event_id: str) -> dict[str, int]:
    """The place of the last event in each channel, in any incarnation of the stream."""
    numbers = sse.parse_id(event_id) if event_id else {}
    return {channel: number % sse.INCARNATION for channel, number in numbers.items()}


@dataclass(frozen=True)
class Received:
    type: str
    data: str
    id: str
    at: float
    """By the wall clock, in seconds since the epoch."""

    @property
    def eids(self) -> dict[str, int]:
        return eids_of(self.id)


@dataclass
class SSEClient:
    """Reads one stream on a thread. With ``reconnect``, it reads again whenever the stream ends.

    It reconnects with the last id that it received, as a browser does. ``events`` contains only
    events of applications; those of the stream itself are in ``control``.
    """

    url: str
    channels: list[str] = field(default_factory=list)
    last_event_id: str = ""
    reconnect: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    patience: float = 60
    """After this many seconds without a byte, the stream has ended."""

    def __post_init__(self) -> None:
        self.events: list[Received] = []
        self.control: list[Received] = []
        self.statuses: list[int] = []
        self.connections = 0
        self.ended = threading.Event()
        self._closed = False
        self._changed = threading.Condition()
        self._connection: http.client.HTTPConnection | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> SSEClient:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        self.drop()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def drop(self) -> None:
        """Cut the connection, as a network failure does."""
        connection = self._connection
        sock = None if connection is None else connection.sock
        if sock is not None:
            with suppress(OSError):  # already closed
                sock.shutdown(socket.SHUT_RDWR)

    def wait_open(self, timeout: float = 60) -> SSEClient:
        """Wait until the stream is open."""
        self.wait_for(lambda: any(e.type == "stream-open" for e in self.control), timeout)
        return self

    def wait_count(self, count: int, timeout: float = 60) -> list[Received]:
        """Wait until ``count`` events have arrived. Returns the events."""
        self.wait_for(lambda: len(self.events) >= count, timeout)
        return self.events

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout), (
                f"after {timeout} s: {len(self.events)} events, the last {self.events[-3:]},"
                f" {self.connections} connections, status {self.statuses[-3:]}, {self.control[-3:]}"
            )

    def _run(self) -> None:
        while not self._closed:
            # To a client all of these mean that the stream has ended.
            with suppress(OSError, http.client.HTTPException):
                self._read_stream()
            if not self.reconnect:
                break
            time.sleep(0.02)
        self.ended.set()
        with self._changed:
            self._changed.notify_all()

    def _read_stream(self) -> None:
        parts = urlsplit(self.url)
        assert parts.hostname
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=self.patience)
        self._connection = connection
        query = urlencode([("channel", channel) for channel in self.channels], quote_via=quote)
        headers = {"Accept": "text/event-stream", **self.headers}
        if self.last_event_id:
            headers["Last-Event-ID"] = self.last_event_id
        try:
            connection.connect()
            if self._closed:  # before there was a socket that `drop` could shut down
                return
            connection.request("GET", f"{parts.path}?{query}", headers=headers)
            response = connection.getresponse()
            self.statuses.append(response.status)
            self.connections += 1
            if response.status == 200:
                self._parse(response)
        finally:
            connection.close()

    def _parse(self, response: http.client.HTTPResponse) -> None:
        event_type, event_id = "", self.last_event_id
        data: list[str] = []
        while line := response.readline():
            text = line.decode().removesuffix("\n")
            if text == "":
                if data:
                    self._record(Received(event_type, "\n".join(data), event_id, time.time()))
                event_type, data = "", []
                continue
            name, _, value = text.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                event_type = value
            elif name == "data":
                data.append(value)
            elif name == "id":
                event_id = value

    def _record(self, received: Received) -> None:
        with self._changed:
            # As in a browser, later connections resume from this id.
            self.last_event_id = received.id
            own = received.type.startswith("stream-") or received.type == "keep-alive"
            (self.control if own else self.events).append(received)
            self._changed.notify_all()


#: Opens streams that are closed with the test (the fixture ``stream``).
OpenStream = Callable[..., SSEClient]
