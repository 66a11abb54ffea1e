"""Ends streams when the server that serves them is about to end.

Servers wait for open responses to end, and ASGI has no event that reaches these in time. But for
any reason to end (a signal, its supervisor, its own limit of requests), a server first closes the
sockets on which it listens. So while streams are open, the process looks at its sockets four times
a second. Granian keeps them open, but there the signal is noticed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from . import sockets

# Seconds between two looks.
_INTERVAL = 0.25


class Server:
    """The sockets of this process that listen on one port, and their streams in one event loop.

    Port None stands for Unix sockets with any path, because servers report paths differently.
    """

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._sockets = sockets.find_listening(self._port)
        self._streams: set[Callable[[], None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ends(self) -> bool:
        """Whether the process got a signal to end, or one of its listening sockets was closed."""
        return _signalled or not all(sockets.is_listening(fd, self._port) for fd in self._sockets)

    def find_again(self) -> None:
        """Find the sockets again: another server can have replaced one that has ended."""
        self._sockets = sockets.find_listening(self._port) or self._sockets

    @contextmanager
    def serving(self, end: Callable[[], None]) -> Iterator[None]:
        """Call ``end`` if the server ends during the block."""
        self._streams.add(end)
        if self._timer is None:
            self._look()
        try:
            yield
        finally:
            self._streams.discard(end)
            if not self._streams and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _look(self) -> None:
        if self.ends:
            for end in self._streams:
                end()
        self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self._look)


_servers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int | None, Server]] = (
    WeakKeyDictionary()
)


def server_of(scope: Mapping[str, Any]) -> Server:
    """The server that received a request, for the running event loop."""
    port = sockets.port_of(scope.get("server"))
    _listen_to_signals()
    servers = _servers.setdefault(asyncio.get_running_loop(), {})
    if port not in servers:
        servers[port] = Server(port)
    elif servers[port].ends:
        servers[port].find_again()
    return servers[port]


_signals_lock = threading.Lock()
_handlers_installed = False
_signalled = False


def _listen_to_signals() -> None:
    """Note signals that stop servers, and then call the handlers that these have installed."""
    global _handlers_installed, _signalled
    with _signals_lock:
        if _handlers_installed or threading.current_thread() is not threading.main_thread():
            return
        _handlers_installed = True
    for number in (signal.SIGTERM, signal.SIGINT):
        previous = signal.getsignal(number)
        signal.signal(number, partial(_on_signal, previous))
        # The first stream of this process can begin when the sockets are closed already, for a
        # client of another server that has ended. Uvicorn would wait for it (server.py, shutdown).
        uvicorn = getattr(previous, "__self__", None)
        if not all(listener.is_serving() for listener in getattr(uvicorn, "servers", [])):
            _signalled = True


def _on_signal(previous: Any, number: int, frame: FrameType | None) -> None:
    global _signalled
    _signalled = True
    if callable(previous):
        previous(number, frame)
    elif previous == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _forget_parent() -> None:
    """Begin again in a process that was forked, whose server can have other signal handlers."""
    global _signals_lock, _handlers_installed, _signalled
    _signals_lock = threading.Lock()  # another thread could have held the old one
    _handlers_installed = _signalled = False
    _servers.clear()


os.register_at_fork(after_in_child=_forget_parent)
