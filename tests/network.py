"""A network between a client and a server, which a test can break."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from types import TracebackType

from pg_eventstream.demo.processes import HOST

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST, and drops what is not sent yet


class Network:
    """Forwards TCP connections to `port` of this machine, from a port of its own (`port`).

    `cut()` resets all connections, and new ones at once. `deaf()` lets nothing pass and tells
    nobody, new connections included. `heal()` ends both; connections that were deaf then deliver
    what they held back. `forget()` ends both as well, for new connections: those that are open stay
    deaf for ever, as behind a router that was restarted. `point()` leads new ones to another port.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.connections = 0
        """So many were made, those that were reset at once included."""
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_cut = False
        self._hears = threading.Event()
        self._hears.set()
        self._forgotten: list[threading.Event] = []
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
        self.cut()
        for hears in (self._hears, *self._forgotten):
            hears.set()
        self._thread.join(10)

    def cut(self) -> None:
        with self._lock:
            self._is_cut = True
            for connection in self._open:
                _reset(connection)

    def deaf(self) -> None:
        self._hears.clear()

    def heal(self) -> None:
        with self._lock:
            self._is_cut = False
        self._hears.set()

    def forget(self) -> None:
        self._hears.clear()
        self._forgotten.append(self._hears)
        self._hears = threading.Event()
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
                hears.wait()
                with suppress(OSError):  # either side has ended, or we have
                    server.connect((HOST, self._target))
                    back = threading.Thread(
                        target=self._pump, args=[server, client, hears], daemon=True
                    )
                    back.start()
                    self._pump(client, server, hears)
                    back.join()
            finally:
                with self._lock:
                    self._open -= {client, server}

    def _pump(self, source: socket.socket, sink: socket.socket, hears: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                hears.wait()
                sink.sendall(data)
        hears.wait()  # the end is news, too
        for side in (source, sink):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


def _reset(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        connection.shutdown(socket.SHUT_RDWR)
