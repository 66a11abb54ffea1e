"""Finds out from the process's sockets what ASGI does not tell about a server and its clients."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def port_of(address: Any) -> int | None:
    """The port of a ``client`` or ``server`` in a request's scope; None for a Unix socket.

    Servers write addresses differently: a port can be text, and a path can be split.
    """
    try:
        return int(address[1])
    except (TypeError, ValueError, IndexError):
        return None


def find_listening(port: int | None) -> list[int]:
    """The descriptors of sockets that listen on a port; None stands for Unix sockets."""
    return [fd for fd in _files() if is_listening(fd, port)]


def is_listening(fd: int, port: int | None) -> bool:
    """Whether the descriptor is a socket that listens on this port."""
    with suppress(OSError), _as_socket(fd) as opened:
        if opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            name = opened.getsockname()
            return (name[1] if isinstance(name, tuple) else None) == port
    return False


def find_connection(client: Any, server: Any) -> int | None:
    """The descriptor of the connection from a scope's ``client`` to its ``server``, if any."""
    ports = port_of(client), port_of(server)
    if None in ports:
        return None
    for fd in _files():
        with suppress(OSError), _as_socket(fd) as opened:
            peer = opened.getpeername()
            if not isinstance(peer, tuple):  # of a Unix socket
                continue
            if (peer[0], peer[1], opened.getsockname()[1]) == (client[0], *ports):
                return fd
    return None


def count_unsent(fd: int) -> int | None:
    """The bytes in a connection that the other side has not acknowledged; None if unknown."""
    waiting = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.TIOCOUTQ, waiting)  # Linux: SIOCOUTQ, see tcp(7)
    except OSError:
        return None
    return waiting[0]


def _files() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/dev/fd")]
    except OSError:  # not on all systems
        return []


@contextmanager
def _as_socket(fd: int) -> Iterator[socket.socket]:
    """Open the descriptor as a socket. Raises `OSError` if it is not one."""
    opened = socket.socket(fileno=fd)
    try:
        yield opened
    finally:
        opened.detach()
