"""Python programs that start at once, each forked from a process that has imported what they need.

Most of a second of a processor goes into the imports of a publisher or of an application server,
and the tests start hundreds of them. Here one process imports the modules that need no settings.
For each program it forks a child, which gets the program's arguments, environment and log, and
runs it as ``python -m`` does. Nothing of it is ever used but these modules.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pg_eventstream.servers.processes import Process

#: With what they import. None of these reads a setting when it is imported.
_MODULES = [
    "django.contrib.auth.hashers",
    "django.contrib.messages.middleware",
    "django.contrib.sessions.backends.db",
    "django.contrib.staticfiles.handlers",
    "django.core.asgi",
    "django.core.management.commands.runserver",
    "django.core.servers.basehttp",
    "django.db.backends.postgresql.base",
    "django.db.backends.postgresql.psycopg_any",
    "django.db.models.sql.compiler",
    "django.template.loader_tags",
    "django.views.generic",
    "gripcontrol",
    "pg_eventstream.consumers.declare",
    "pg_eventstream.operate",
    "pg_eventstream.publisher.doorbell",
    "pg_eventstream.publisher.feed",
    "pg_eventstream.publisher.pruner",
    "pg_eventstream.views",
    "pgtrigger.core",
    "psycopg.types.json",
    "uvicorn.lifespan.on",
    "uvicorn.main",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
]
#: What is reported of each program.
_PID, _STATUS = "pid", "status"


# The process that forks


def serve(control: socket.socket) -> None:
    """Fork programs until the other end of the socket is closed. Returns in each child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _MODULES:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that collections in the children copy no pages
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake.fileno())
    reports: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            woken.recv(1000)
            while reports:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                with reports.pop(pid) as report, contextlib.suppress(OSError):
                    report.send(json.dumps({_STATUS: os.waitstatus_to_exitcode(status)}).encode())
        if control in ready:
            request, fds, _, _ = socket.recv_fds(control, 1 << 20, 3)
            if not request:
                os._exit(0)
            report = socket.socket(fileno=fds[0])
            pid = os.fork()
            if not pid:
                for end in (control, woken, wake, report, *reports.values()):
                    end.close()
                _become(fds[1], fds[2], **json.loads(request))
                return
            for fd in fds[1:]:
                os.close(fd)
            reports[pid] = report
            report.send(json.dumps({_PID: pid}).encode())


def _become(
    output: int,
    errors: int,
    arguments: list[str],
    environment: dict[str, str],
    directory: str,
) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.close(output)
    os.close(errors)
    os.chdir(directory)
    paths = [path for path in sys.path[1:] if path not in _python_path(os.environ)]
    sys.path[:] = [directory, *_python_path(environment), *paths]
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments


def _python_path(environment: Mapping[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


# The process of the tests


class _Child:
    """A forked program, with the methods of `subprocess.Popen` that `Process` calls."""

    def __init__(self, report: socket.socket) -> None:
        self._report = report
        self.pid: int = self._receive()[_PID]
        self.returncode: int | None = None

    def _receive(self) -> dict[str, int]:
        message: dict[str, int] = json.loads(self._report.recv(100) or "{}")
        return message or {_STATUS: -signal.SIGKILL}  # the process that forks has ended

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
            self.returncode = self._receive()[_STATUS]
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

    def __init__(self, options: Sequence[str], environment: Mapping[str, str]) -> None:
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with control:
            self._process = subprocess.Popen(
                [sys.executable, *options, "-m", __name__, str(control.fileno())],
                cwd=_ROOT,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[control.fileno()],
                start_new_session=True,
            )
        atexit.register(self._end)

    def _end(self) -> None:
        self._control.close()
        self._process.wait(10)

    def fork(self, request: Mapping[str, Any], output: int, errors: int) -> _Child:
        mine, report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with report, self._lock:
            fds = [report.fileno(), output, errors]
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)
        return _Child(mine)


_ROOT = Path(__file__).parents[2]
#: By the options of the interpreter and the environment that it reads when it starts.
_forking: dict[Any, _Forking] = {}


def _fork(
    command: Sequence[str],
    environment: Mapping[str, str],
    directory: str | Path | None,
    output: int,
    errors: int,
) -> _Child | None:
    """Fork the program. Returns None if it would not be the same."""
    if "-m" not in command or command[0] != sys.executable:
        return None
    at = command.index("-m")
    options, arguments = command[1:at], command[at + 1 :]
    read = {k: v for k, v in environment.items() if k.startswith(("PYTHON", "PSYCOPG", "LD_"))}
    paths = _python_path(read)
    if "COVERAGE_PROCESS_CONFIG" in environment or (paths and str(_ROOT) not in paths):
        return None  # coverage measures programs from their start; others are of another version
    if "PROMETHEUS_MULTIPROC_DIR" in environment:
        return None  # prometheus-client reads it when it is imported
    read.pop("PYTHONPATH", None)
    key = (*options, *sorted(read.items()))
    if key not in _forking:
        _forking[key] = _Forking(options, environment)
    request = {
        "arguments": arguments,
        "environment": dict(environment),
        "directory": str(directory or os.getcwd()),
    }
    return _forking[key].fork(request, output, errors)


class ForkedProcess(Process):
    """A `Process` of ``[sys.executable, …, "-m", module, …]``."""

    def _popen(self, log: IO[bytes] | None) -> Any:
        environment = os.environ if self._environment is None else self._environment
        fd = 1 if log is None else log.fileno()
        child = _fork(self.arguments, environment, self._directory, fd, fd)
        return super()._popen(log) if child is None else child


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    directory: str | Path | None = None,
    *,
    timeout: float = 120,
    merged: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run ``[sys.executable, …, "-m", module, …]`` until it ends. Returns its output.

    With ``merged``, what it says on standard error is in ``stdout``.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as own:
        errors = output if merged else own
        child: Any = _fork(command, environment, directory, output.fileno(), errors.fileno())
        child = child or subprocess.Popen(
            command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=errors,
        )  # fmt: skip
        try:
            child.wait(timeout)
        finally:
            child.kill()
        texts = []
        for file in (output, own):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(list(command), child.wait(), *texts)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
