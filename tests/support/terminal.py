"""A management command in a terminal of its own (a pty), as a person runs it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from types import TracebackType

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Terminal:
    """Runs a command whose output, errors and input are a terminal. It ends with the block."""

    def __init__(
        self,
        *command: str,
        environment: Mapping[str, str],
        columns: int = 80,
        stdin: str | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", "django", *command]
        self._environment = {**environment, "TERM": "xterm"}
        self._columns = columns
        self._stdin = stdin
        #: All that it has written.
        self.output = ""

    def __enter__(self) -> Terminal:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, self._columns, 0, 0))
        # A process without a terminal must not open one by its name: that would become its own, and
        # would end it when it is closed.
        with open(self._stdin or os.dup(slave), "rb", buffering=0) as stdin:
            self._child = subprocess.Popen(
                self._command,
                stdin=stdin,
                stdout=slave,
                stderr=slave,
                env=self._environment,
                start_new_session=True,
            )
        os.close(slave)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self._master)

    def wait_for(self, text: str, timeout: float = 30) -> str:
        """Read until the output contains the text. Returns all output."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            if time.monotonic() > deadline or not self._read(0.2):
                raise AssertionError(f"{text!r} is not in {self.output!r}")
        return self.output

    def type(self, keys: str) -> None:
        """Type these keys. ``\\n`` is Enter, ``\\x04`` is Ctrl-D."""
        os.write(self._master, keys.encode())

    def interrupt(self) -> None:
        """What Ctrl-C does: SIGINT to the command."""
        self._child.send_signal(signal.SIGINT)

    def wait(self, timeout: float = 30) -> int:
        """Read until it ends. Returns its exit status."""
        deadline = time.monotonic() + timeout
        while self._read(0.2):
            assert time.monotonic() < deadline, self.output
        return self._child.wait(timeout)

    @property
    def lines(self) -> list[str]:
        """The lines of the output, without colours."""
        return _COLOUR.sub("", self.output).replace("\r\n", "\n").splitlines()

    def _read(self, timeout: float) -> bool:
        """Read what is there. Returns whether there can be more."""
        if not select.select([self._master], [], [], timeout)[0]:
            return True
        try:
            found = os.read(self._master, 65_536)
        except OSError:  # EIO: all processes have closed the terminal
            return False
        self.output += found.decode(errors="replace")
        return bool(found)
