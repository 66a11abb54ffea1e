"""Child processes that are ready when start() returns and end with this process."""

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

# A shell that runs for each child and reads a pipe whose other end only we hold. A line means that
# the child has ended. The end of the pipe without a line means that we died, so the child is
# signalled. (PR_SET_PDEATHSIG would need no shell, but it fires when the *thread* that forked ends,
# and only Linux has it.)
_GUARD = 'read -r line || kill -s "$1" -- "-$2" 2>/dev/null'


class ServerError(RuntimeError):
    """A server did not start or ended unexpectedly. The message contains the end of its log."""


class Process:
    """A child process in a new session, which writes to a log file or to our output.

    It does not outlive this process: even if we are killed by SIGKILL, its group receives
    `orphan_signal`. `stop()` and `kill()` end all processes of its session. They can be called at
    any time, and repeatedly.
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
        self._session_ended = True
        self._log_start = 0

    @property
    def pid(self) -> int:
        """The child's process id, which is also the id of its process group."""
        if self._child is None:
            raise ServerError(f"{self.name} has not been started.")
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
        """Start the child and return once `ready()` is true, which is called every `check` s.

        Raises ServerError, with nothing left running, if the child ends before that or if
        `timeout` seconds have passed.
        """
        if self.running:
            raise ServerError(f"{self.name} is already running.")
        self._spawn()
        try:
            if ready is not None:
                wait_until(lambda: not self.running or ready(), timeout=timeout, check=check)
                if not self.running:
                    raise self.error("did not start")
        except TimeoutError:
            self.kill()
            raise self.error(f"was not ready within {timeout:g} s") from None
        except BaseException:
            self.kill()
            raise

    def wait(self, *, timeout: float) -> int:
        """The child's exit status. Raises ServerError if it still runs after `timeout` seconds."""
        if self._child is None:
            raise ServerError(f"{self.name} has not been started.")
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.error(f"did not end within {timeout:g} s") from None

    def stop(self, number: signal.Signals = signal.SIGTERM, *, timeout: float = 10) -> None:
        """Send the signal to the child, then SIGKILL to all that remains of its session.

        SIGKILL is sent as soon as the child has ended, and after `timeout` seconds at the latest.
        """
        child = self._child
        if child is not None and child.poll() is None:
            child.send_signal(number)
            self._signal_all(signal.SIGCONT)  # a suspended process would not see it
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to the child and to all of its session, and wait until they have ended."""
        if self._child is not None and not self._session_ended:
            self._child.kill()
            wait_until(lambda: not self._signal_all(signal.SIGKILL), timeout=10)
            self._child.wait()
            self._session_ended = True  # from now on its number can belong to another session
        if self._guard is not None:
            # A guard that has ended has closed its end of the pipe.
            with suppress(BrokenPipeError):
                self._guard.communicate(b"\n")
            self._guard = None

    def error(self, what: str) -> ServerError:
        """Make a ServerError with the child's exit status and the end of its log."""
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
            stack.enter_context(_delay_signals())
            self._child = self._popen(log)
            self._session_ended = False
            self._guard = subprocess.Popen(
                ["sh", "-c", _GUARD, "guard", self._orphan_signal.name[3:], str(self._child.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _popen(self, log: IO[bytes] | None) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=None if self._environment is None else dict(self._environment),
            cwd=self._directory,
            start_new_session=True,  # Ctrl-C reaches only us; we stop the servers in order
            user=self._user,
            group=None if self._user is None else pwd.getpwnam(self._user).pw_gid,
            extra_groups=None if self._user is None else [],
        )

    def _signal_all(self, number: signal.Signals) -> bool:
        """Signal all processes of the child's session. Returns whether there were any.

        A signal to the process group is not enough: Pushpin's services are in other groups.
        """
        found = False
        for pid in _session(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                found = True
        return found


_Server = TypeVar("_Server", bound="Server")


class Server(ABC):
    """A server that runs as a child process for the duration of a ``with`` block."""

    name: str
    _process: Process | None = None

    @abstractmethod
    def start(self) -> None:
        """Return once it is ready. Raises ServerError, with nothing left running, if it fails."""

    @abstractmethod
    def stop(self) -> None:
        """Stop in order. Can be called at any time, and repeatedly."""

    @property
    def process(self) -> Process:
        if self._process is None:
            raise ServerError(f"{self.name} has not been started.")
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
    """Return once the condition is true, which is called every `check` seconds.

    Raises TimeoutError after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"still waiting after {timeout:g} s")
        time.sleep(check)


def free_port() -> int:
    """A TCP port of the loopback interface on which nothing listens now.

    It is below the range from which systems take the local ports of outgoing connections (Linux
    from 32768, others from 49152). Otherwise such a connection could take the port before the
    server does, or while it restarts.
    """
    for _ in range(1000):
        port = random.randrange(16384, 32768)
        if is_free(port):
            return port
    raise ServerError("No free TCP port was found between 16384 and 32768.")


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback interface."""
    with socket.socket() as probe:
        # As servers do: a connection that was just closed does not block the port.
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
    """The running child processes of a process. Empty on systems without /proc."""
    return [pid for pid, its_parent, _ in _processes() if its_parent == parent]


def _session(leader: int) -> list[int]:
    """The running processes of a session. Empty on systems without /proc."""
    return [pid for pid, _, session in _processes() if session == leader]


def _processes() -> Iterator[tuple[int, int, int]]:
    """All running processes: id, parent, session."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # pid (name) state parent group session …; the name can contain spaces and parentheses
            state, parent, _group, session = path.read_text().rpartition(")")[2].split()[:4]
            if state not in ("Z", "X"):
                yield int(path.parent.name), int(parent), int(session)


@contextmanager
def _delay_signals() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until the end of the block.

    Their handlers can raise. Between the fork and the assignment of its result, that would lose
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
