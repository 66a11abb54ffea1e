"""A program that is asked for, of the process that forks: see `tests.support.forked`.

As a program, this file takes the place of the interpreter in shell scripts. It imports only what
is cheap: ``python -I -S fork_request.py ADDRESS ARGUMENT…``, with the arguments of the interpreter.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence

#: What is reported of each program.
PID, STATUS = "pid", "status"


def listen() -> socket.socket:
    """A socket to which requests are sent, with an address that the system chooses."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")
    listener.listen(64)
    return listener


def address_of(listener: socket.socket) -> str:
    return bytes(listener.getsockname()[1:]).decode()


def ask(
    address: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    directory: str,
    files: Sequence[int],
) -> socket.socket:
    """Ask for a program with these standard files. Returns the socket for `receive`."""
    request = {
        "arguments": list(arguments),
        "environment": dict(environment),
        "directory": directory,
    }
    reports = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reports.connect(f"\0{address}")
    socket.send_fds(reports, [json.dumps(request).encode()], files)
    return reports


def receive(reports: socket.socket) -> dict[str, int]:
    """The next report: first the id, and at its end the status. Empty if no process forks now."""
    report: dict[str, int] = json.loads(reports.recv(100) or "{}")
    return report


if __name__ == "__main__":
    with ask(sys.argv[1], sys.argv[2:], os.environ, os.getcwd(), [0, 1, 2]) as running:
        receive(running)
        status = receive(running)[STATUS]
    sys.exit(status if status >= 0 else 128 - status)
