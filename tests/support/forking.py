"""The process that forks programs, until that of the tests ends: see `tests.support.forked`."""

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
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from types import NoneType

from tests.support.fork_request import PID, STATUS

#: With what they import. None of these reads a setting when it is imported, or opens a file.
_MODULES = [
    "autobahn.twisted.websocket",  # and all of daphne except its event loop
    "channels.routing",
    "daphne.endpoints",
    "daphne.http_protocol",
    "django.contrib.auth.apps",
    "django.contrib.auth.hashers",
    "django.contrib.auth.password_validation",
    "django.contrib.auth.validators",
    "django.contrib.messages.middleware",
    "django.contrib.postgres.fields",
    "django.contrib.sessions.backends.db",
    "django.contrib.sites.shortcuts",
    "django.contrib.staticfiles.handlers",
    "django.core.asgi",
    "django.core.cache.backends.locmem",
    "django.core.management.commands.makemigrations",
    "django.core.management.commands.migrate",
    "django.core.management.commands.runserver",
    "django.core.management.commands.shell",
    "django.core.servers.basehttp",
    "django.db.backends.postgresql.base",
    "django.db.backends.postgresql.psycopg_any",
    "django.db.models.sql.compiler",
    "django.middleware.cache",
    "django.template.loader_tags",
    "django.utils.translation.reloader",
    "django.views.csrf",
    "django.views.defaults",
    "django.views.generic",
    "gripcontrol",
    "pg_eventstream.consumers.declare",
    "pg_eventstream.operate",
    "pg_eventstream.publisher.doorbell",
    "pg_eventstream.publisher.feed",
    "pg_eventstream.publisher.pruner",
    "pg_eventstream.views",
    "pgtrigger.core",
    "pgtrigger.migrations",
    "psycopg.types.hstore",
    "psycopg.types.json",
    "twisted.internet.asyncioreactor",
    "uvicorn.lifespan.on",
    "uvicorn.loops.asyncio",
    "uvicorn.main",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
    "werkzeug.test",  # of django_grip
]


def serve(listener: socket.socket) -> list[str]:
    """Fork programs until standard input is closed. Returns in each child, with its arguments."""
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
        ready, _, _ = select.select([sys.stdin, listener, woken], [], [])
        if sys.stdin in ready:
            os._exit(0)
        if woken in ready:
            woken.recv(1000)
            while reports:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                with reports.pop(pid) as report:
                    _send(report, STATUS, os.waitstatus_to_exitcode(status))
        if listener in ready:
            report, _ = listener.accept()
            message, files, _, _ = socket.recv_fds(report, 1 << 20, 3)
            request = json.loads(message)
            pid = os.fork()
            if not pid:
                for end in (listener, woken, wake, report, *reports.values()):
                    end.close()
                _become(files, request["environment"], request["directory"])
                return list(request["arguments"])
            for file in files:
                os.close(file)
            reports[pid] = report
            _send(report, PID, pid)


def _send(report: socket.socket, name: str, value: int) -> None:
    with contextlib.suppress(OSError):  # who asked has ended
        report.send(json.dumps({name: value}).encode())


def _become(files: Sequence[int], environment: Mapping[str, str], directory: str) -> None:
    """Take over what a new process gets."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(directory)
    paths = [path for path in sys.path[1:] if path not in python_path(os.environ)]
    sys.path[:] = [directory, *python_path(environment), *paths]
    os.environ.clear()
    os.environ.update(environment)
    if warned := environment.get("PYTHONWARNINGS"):
        _set_warnings(*warned.split(","))


def _set_warnings(*options: str) -> None:
    sys.warnoptions += options
    warnings._processoptions(options)  # type: ignore[attr-defined]


def python_path(environment: Mapping[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def run(arguments: Sequence[str]) -> None:
    """Run ``-m module …`` or ``-c code …``, as the interpreter does."""
    kind, *rest = arguments
    if kind == "-W":
        _set_warnings(rest[0])
        run(rest[1:])
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})


def end(status: int) -> None:
    """End as the interpreter does, but leave its modules: to destroy them copies what is shared."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the other threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        run(serve(socket.socket(fileno=int(sys.argv[1]))))
    except SystemExit as ended:
        if not isinstance(ended.code, (int, NoneType)):
            raise  # it is a message
        end(ended.code or 0)
    end(0)
