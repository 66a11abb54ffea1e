"""Child processes that are ready when started, and gone when we are."""

from __future__ import annotations

import os
import pwd
import random
import signal
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

HOST = "127.0.0.1"
_LOG_TAIL_LINES, _LOG_TAIL_BYTES = 20, 10_000

# Runs beside each child and reads a pipe that only we hold. A line means that all is well. The
# end of the pipe without one means that we died, however that came: then the child has to go.
# (PR_SET_PDEATHSIG would save this process, but it fires when the *thread* that forked ends, and
# Linux alone has it.)
_GUARD = 'read -r line || kill -s "$1" -- "-$2" 2>/dev/null'


class ServerError(RuntimeError):
    """A server did not start, or ended by itself. The message ends with the tail of its log."""


class Process:
    """One child process, in a session of its own, that writes to a log file (or to our output).

    It does not outlive us: even after a SIGKILL of ours its group receives `orphan_signal`.
    `stop()` and `kill()` leave nothing of its session behind. They may be called at any time, and
    again.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str | Path],
        *,
        log_path: Path | None,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        directory: Path | None = None,
        orphan_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.arguments = [str(argument) for argument in arguments]
        self.log_path = log_path
        self._environment = environment
        self._user = user
        self._directory = directory
        self._orphan_signal = orphan_signal
        self._child: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._swept = True  # whether nothing is left of the session
        self._log_start = 0

    @property
    def pid(self) -> int:
        """The child's process id, which is also its process group's."""
        if self._child is None:
            raise ServerError(f"{self.name} has not been started")
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def returncode(self) -> int | None:
        return None if self._child is None else self._child.poll()

    def start(
        self, *, ready: Callable[[], bool] | None = None, timeout: float = 30, check: float = 0.02
    ) -> None:
        """Start the child and return once `ready()` is true, asked every `check` seconds.

        Raises ServerError, with nothing left running, if the child ends before, or after
        `timeout` seconds.
        """
        if self.running:
            raise ServerError(f"{self.name} is already running")
        self._spawn()
        try:
            if ready is not None:
                wait_until(lambda: not self.running or ready(), timeout=timeout, check=check)
                if not self.running:
                    raise self.error("did not start")
        except TimeoutError:
            self.kill()
            raise self.error(f"was not ready after {timeout:g} s") from None
        except BaseException:
            self.kill()
            raise

    def wait(self, *, timeout: float) -> int:
        """The child's exit status. Raises ServerError if it still runs after `timeout` seconds."""
        if self._child is None:
            raise ServerError(f"{self.name} has not been started")
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.error(f"has not ended after {timeout:g} s") from None

    def stop(self, number: signal.Signals = signal.SIGTERM, *, timeout: float = 10) -> None:
        """Send the signal to the child, then SIGKILL to what is left of its session.

        The latter comes at once when the child has ended, and at the latest after `timeout`
        seconds.
        """
        child = self._child
        if child is not None and child.poll() is None:
            child.send_signal(number)
            self._signal_all(signal.SIGCONT)  # a suspended process would not see it
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to the child and all of its session, and wait until they are gone."""
        if self._child is not None and not self._swept:
            self._child.kill()
            wait_until(lambda: not self._signal_all(signal.SIGKILL), timeout=10)
            self._child.wait()
            self._swept = True  # from now on the number may be another session's
        if self._guard is not None:
            # A guard that has ended has closed its end of the pipe.
            with suppress(BrokenPipeError):
                self._guard.communicate(b"\n")
            self._guard = None

    def error(self, what: str) -> ServerError:
        """A ServerError that says how the child ended and shows the end of its log."""
        status = self.returncode
        message = f"{self.name} {what}" + ("" if status is None else f" (exit status {status})")
        if self.log_path is not None:
            message += f"; the end of {self.log_path}:\n{_tail(self.log_path, self._log_start)}"
        return ServerError(message)

    def _spawn(self) -> None:
        with ExitStack() as stack:
            log: IO[bytes] | None = None
            if self.log_path is not None:
                self.log_path.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(self.log_path.open("ab"))
                self._log_start = log.tell()
            stack.enter_context(_signals_later())
            self._child = subprocess.Popen(
                self.arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=None if self._environment is None else dict(self._environment),
                cwd=self._directory,
                start_new_session=True,  # Ctrl-C is for us; we stop the servers in our order
                user=self._user,
                group=None if self._user is None else pwd.getpwnam(self._user).pw_gid,
                extra_groups=None if self._user is None else [],
            )
            self._swept = False
            self._guard = subprocess.Popen(
                ["sh", "-c", _GUARD, "guard", self._orphan_signal.name[3:], str(self._child.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _signal_all(self, number: signal.Signals) -> bool:
        """Signal all processes of the child's session; whether there were any.

        A signal to the process group is not enough: Pushpin's services have groups of their own.
        """
        found = False
        for pid in _session(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                found = True
        return found


_Server = TypeVar("_Server", bound="Server")


class Server(ABC):
    """A server that runs as a child of ours while a ``with`` block lasts."""

    name: str
    _process: Process | None = None

    @abstractmethod
    def start(self) -> None:
        """Return once it is ready. Raises ServerError, with nothing left running, if it is not."""

    @abstractmethod
    def stop(self) -> None:
        """Stop in order. May be called at any time, and again."""

    @property
    def process(self) -> Process:
        if self._process is None:
            raise ServerError(f"{self.name} has not been started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def __enter__(self: _Server) -> _Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def wait_until(condition: Callable[[], bool], *, timeout: float, check: float = 0.02) -> None:
    """Return once the condition is true, asked every `check` seconds; TimeoutError if it is not."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"still waiting after {timeout:g} s")
        time.sleep(check)


def free_port() -> int:
    """A TCP port of the loopback interface on which nothing listens now.

    It lies below the range from which systems take the local ports of outgoing connections
    (Linux from 32768, others from 49152). Otherwise such a connection could take the port before
    the server does, or while it restarts.
    """
    for _ in range(1000):
        port = random.randrange(16384, 32768)
        if is_free(port):
            return port
    raise ServerError("no free TCP port found between 16384 and 32768")


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback interface."""
    with socket.socket() as probe:
        # As servers do: a connection that has just been closed there does not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def accepts(port: int) -> bool:
    """Whether something accepts TCP connections on this port of the loopback interface."""
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def _tail(path: Path, start: int) -> str:
    try:
        with path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(start, end - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
            return "\n".join(lines[-_LOG_TAIL_LINES:]) or "(nothing)"
    except OSError as error:
        return f"({error})"


def children(parent: int) -> list[int]:
    """The running child processes of a process. Empty where there is no /proc."""
    return [pid for pid, its_parent, _ in _processes() if its_parent == parent]


def _session(leader: int) -> list[int]:
    """The running processes of a session. Empty where there is no /proc."""
    return [pid for pid, _, session in _processes() if session == leader]


def _processes() -> Iterator[tuple[int, int, int]]:
    """All running processes: id, parent, session."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # pid (name) state parent group session …; the name may hold spaces and parentheses
            state, parent, _group, session = path.read_text().rpartition(")")[2].split()[:4]
            if state not in ("Z", "X"):
                yield int(path.parent.name), int(parent), int(session)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back for the duration of the block.

    Their handlers may raise. Between the fork and the assignment of its result that would lose
    the child. (Blocking the signals would be simpler, but children inherit the mask.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
        return
    arrived: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for late in arrived:
        signal.raise_signal(late)
