"""Python programs that start at once, each forked from a process that has imported what they need.

Most of a second of a processor goes into the imports of a publisher or of an application server,
and the tests start hundreds of them. Here one process imports the modules that need no settings
(`tests.support.forking`). For each program it forks a child, which gets the program's arguments,
environment and files, and runs it as the interpreter does. Nothing of it is ever used but these
modules.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from pg_eventstream.servers.processes import Process
from tests.support import fork_request
from tests.support.fork_request import PID, STATUS
from tests.support.forking import python_path


class _Child:
    """A forked program, with the methods of `subprocess.Popen` that `Process` calls."""

    def __init__(self, report: socket.socket) -> None:
        self._report = report
        self.pid: int = self._receive()[PID]
        self.returncode: int | None = None

    def _receive(self) -> dict[str, int]:
        has_ended = {STATUS: -signal.SIGKILL}  # the process that forks
        return fork_request.receive(self._report) or has_ended

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            waiting = select.poll()
            waiting.register(self._report, select.POLLIN)
            if not waiting.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = self._receive()[STATUS]
            self._report.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Forking:
    """A process that forks, which ends with this one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        with fork_request.listen() as listener:
            self.address = fork_request.address_of(listener)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.forking", str(listener.fileno())],
                cwd=_ROOT,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        atexit.register(self._process.communicate, timeout=10)


_ROOT = Path(__file__).parents[2]
#: By the environment that the interpreter reads when it starts.
_forking: dict[Any, _Forking] = {}


def _fork(
    command: Sequence[str],
    environment: Mapping[str, str],
    directory: str | Path | None,
    files: Sequence[int],
) -> _Child | None:
    """Fork the program with these standard files. Returns None if it would not be the same."""
    if command[0] != sys.executable or command[1] not in ("-W", "-m", "-c"):
        return None
    forking = _forking_for(environment)
    if forking is None:
        return None
    directory = str(directory or os.getcwd())
    return _Child(fork_request.ask(forking.address, command[1:], environment, directory, files))


def _forking_for(environment: Mapping[str, str]) -> _Forking | None:
    read = {k: v for k, v in environment.items() if k.startswith(("PYTHON", "PSYCOPG", "LD_"))}
    paths = python_path(read)
    if "COVERAGE_PROCESS_CONFIG" in environment or (paths and str(_ROOT) not in paths):
        return None  # coverage measures programs from their start; others are of another version
    if "PROMETHEUS_MULTIPROC_DIR" in environment:
        return None  # prometheus-client reads it when it is imported
    for name in ("PYTHONPATH", "PYTHONWARNINGS"):  # can be changed after the start
        read.pop(name, None)
    key = tuple(sorted(read.items()))
    if key not in _forking:
        _forking[key] = _Forking({k: v for k, v in environment.items() if k != "PYTHONWARNINGS"})
    return _forking[key]


def interpreter(environment: Mapping[str, str]) -> str:
    """What runs programs in the same way in a shell, where it takes the place of ``python``."""
    forking = _forking_for(environment)
    if forking is None:
        return shlex.quote(sys.executable)
    return shlex.join([sys.executable, "-IS", fork_request.__file__, forking.address])


class ForkedProcess(Process):
    """A `Process` of the Python with which the tests run."""

    def _popen(self, log: IO[bytes] | None) -> Any:
        environment = os.environ if self._environment is None else self._environment
        output = 1 if log is None else log.fileno()
        with open(os.devnull, "rb") as nothing:
            files = [nothing.fileno(), output, output]
            child = _fork(self.arguments, environment, self._directory, files)
        return super()._popen(log) if child is None else child


def run(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    directory: str | Path | None = None,
    *,
    text: str = "",
    timeout: float = 120,
    merged: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run ``[sys.executable, …]`` with this input until it ends. Returns its output.

    With ``merged``, what it says on standard error is in ``stdout``.
    """
    environment = os.environ if environment is None else environment
    with ExitStack() as stack:
        given, output, own = (stack.enter_context(TemporaryFile()) for _ in range(3))
        given.write(text.encode())
        given.seek(0)
        errors = output if merged else own
        files = [given.fileno(), output.fileno(), errors.fileno()]
        child: Any = _fork(command, environment, directory, files)
        child = child or subprocess.Popen(
            command, cwd=directory, env=environment, stdin=given, stdout=output, stderr=errors
        )
        try:
            child.wait(timeout)
        finally:
            child.kill()
        texts = []
        for file in (output, own):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(list(command), child.wait(), *texts)
