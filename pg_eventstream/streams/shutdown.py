"""Ends streams when the server that serves them wants to end.

Servers wait for open responses to end, and ASGI has no event that reaches these in time. But
however a server is told - by a signal, by its supervisor, by its own limit of requests - it first
closes the sockets at which it listens. So while streams are open the process looks at its sockets
four times a second. Granian keeps them open; there the signal says it.
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
    """What listens in this process at one port, and the streams of one event loop from there.

    Port None stands for Unix sockets, whatever their path: servers disagree on how to tell it.
    """

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._sockets = sockets.listening(self._port)
        self._streams: set[Callable[[], None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ends(self) -> bool:
        """Whether the process was told to end, or one of the sockets that were found is closed."""
        return _told or not all(sockets.listens(fd, self._port) for fd in self._sockets)

    def find_again(self) -> None:
        """Another server may listen in place of the one that has ended."""
        self._sockets = sockets.listening(self._port) or self._sockets

    @contextmanager
    def serving(self, end: Callable[[], None]) -> Iterator[None]:
        """Call ``end`` if the server ends meanwhile."""
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
    """The server to which a request came, of the running event loop."""
    port = sockets.port_of(scope.get("server"))
    _listen_to_signals()
    servers = _servers.setdefault(asyncio.get_running_loop(), {})
    if port not in servers:
        servers[port] = Server(port)
    elif servers[port].ends:
        servers[port].find_again()
    return servers[port]


_signals_lock = threading.Lock()
_signals_are_ours = False
_told = False


def _listen_to_signals() -> None:
    """Note those that stop servers, before the handlers that these have installed."""
    global _signals_are_ours, _told
    with _signals_lock:
        if _signals_are_ours or threading.current_thread() is not threading.main_thread():
            return
        _signals_are_ours = True
    for number in (signal.SIGTERM, signal.SIGINT):
        previous = signal.getsignal(number)
        signal.signal(number, partial(_on_signal, previous))
        # The first stream of this process may come when the sockets are closed already: clients
        # come here from others that end. Uvicorn would wait for it (server.py, shutdown).
        uvicorn = getattr(previous, "__self__", None)
        if not all(listener.is_serving() for listener in getattr(uvicorn, "servers", [])):
            _told = True


def _on_signal(previous: Any, number: int, frame: FrameType | None) -> None:
    global _told
    _told = True
    if callable(previous):
        previous(number, frame)
    elif previous == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _forget_parent() -> None:
    """In a process that was forked: whoever serves here has yet to say how it is stopped."""
    global _signals_lock, _signals_are_ours, _told
    _signals_lock = threading.Lock()  # another thread may have held it
    _signals_are_ours = _told = False
    _servers.clear()


os.register_at_fork(after_in_child=_forget_parent)
