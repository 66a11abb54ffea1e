"""A network between a client and a server, which a test can break."""

from __future__ import annotations

import math
import socket
import struct
import threading
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Literal

from pg_eventstream.servers.processes import HOST

Side = Literal["client", "server"]

_SIDES: tuple[Side, Side] = ("client", "server")
_PIECE = 65536
_PIECES_PER_SECOND = 20  # of a slow connection
# Otherwise the system would accept megabytes from a sender at once.
_SLOW_BUFFER, _BUFFER = 16384, 1_000_000
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST and drops unsent data


class Network:
    """Forwards TCP connections from a new port (`port`) to another port of this machine.

    `cut()` resets all connections, and new ones immediately. `deaf()` silently holds back all data,
    also of new connections; `deaf("server")` only data to the server, `deaf("client")` only data
    to the client. `delay()` holds each piece back for some seconds. `throttle()` limits the bytes
    per second in each direction. `cut_after()` breaks each connection after some bytes of the
    response: by a reset, or as if the server had sent everything. `heal()` ends all of these;
    connections that were deaf then deliver what they held back. `forget()` does so for new
    connections only: open ones stay deaf permanently, as after a restart of a router. `point()`
    leads new connections to another port.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.connections = 0
        """The number of connections, including those that were reset immediately."""
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_cut = False
        self._hears = {side: threading.Event() for side in _SIDES}
        self._forgotten: list[threading.Event] = []
        self._delay = 0.0
        self._rate: int | None = None
        self._cut_after: int | None = None
        self._resets = True
        self._closing = threading.Event()
        self.heal()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Network:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._closing.set()
        self.cut()
        for hears in (*self._hears.values(), *self._forgotten):
            hears.set()
        self._thread.join(10)

    def cut(self) -> None:
        with self._lock:
            self._is_cut = True
            for connection in self._open:
                _reset(connection)

    def deaf(self, to: Side | None = None) -> None:
        for side in [to] if to else _SIDES:
            self._hears[side].clear()

    def delay(self, seconds: float) -> None:
        self._delay = seconds

    def throttle(self, rate: int) -> None:
        self._rate = rate

    def cut_after(self, count: int, *, reset: bool = True) -> None:
        self._cut_after, self._resets = count, reset

    def heal(self) -> None:
        with self._lock:
            self._is_cut = False
            if self._rate is not None:
                _set_buffers(_BUFFER, self._open)
        self._delay, self._rate, self._cut_after = 0.0, None, None
        for hears in self._hears.values():
            hears.set()

    def forget(self) -> None:
        for hears in self._hears.values():
            hears.clear()
            self._forgotten.append(hears)
        self._hears = {side: threading.Event() for side in _SIDES}
        self.heal()

    def point(self, port: int) -> None:
        self._target = port

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            self.connections += 1
            threading.Thread(target=self._forward, args=[client], daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        hears = self._hears
        with client, socket.socket() as server:
            with self._lock:
                if self._is_cut:
                    _reset(client)
                    return
                self._open |= {client, server}
            try:
                if self._rate is not None:
                    _set_buffers(_SLOW_BUFFER, [client, server])
                hears["server"].wait()
                with suppress(OSError):  # either side has closed, or this one
                    server.connect((HOST, self._target))
                    back = threading.Thread(
                        target=self._pump,
                        args=[server, client, "client", hears["client"]],
                        daemon=True,
                    )
                    back.start()
                    self._pump(client, server, "server", hears["server"])
                    back.join()
            finally:
                with self._lock:
                    self._open -= {client, server}

    def _pump(
        self, source: socket.socket, sink: socket.socket, to: Side, hears: threading.Event
    ) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(self._piece()):
                if seconds := self._delay + len(data) / (self._rate or math.inf):
                    self._closing.wait(seconds)
                hears.wait()
                passed += len(data)
                if to == "client" and self._cut_after is not None and passed >= self._cut_after:
                    sink.sendall(data[: len(data) - (passed - self._cut_after)])
                    if self._resets:
                        for side in (source, sink):
                            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    break
                sink.sendall(data)
        hears.wait()  # the end is held back, too
        for side in (source, sink):
            with suppress(OSError):
                # A shutdown for writing would mean that the response is complete.
                resets = side.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == _RESET
                side.shutdown(socket.SHUT_RD if resets else socket.SHUT_RDWR)

    def _piece(self) -> int:
        return _PIECE if self._rate is None else max(1, self._rate // _PIECES_PER_SECOND)


def _set_buffers(size: int, connections: Iterable[socket.socket]) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def _reset(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        connection.shutdown(socket.SHUT_RDWR)
