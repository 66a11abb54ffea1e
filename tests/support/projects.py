"""A Django project in a separate directory, served behind the proxy as a user would."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from django.conf import settings as settings_of_tests

from pg_eventstream.servers.processes import accepts
from pg_eventstream.servers.pushpin import Pushpin
from tests.support import forked
from tests.support.database import Database
from tests.support.environment import KEY
from tests.support.publisher import PublisherProcess

ROOT = Path(__file__).parents[2]
DJANGO = [sys.executable, "-W", "error", "-m", "django"]


class Project:
    """The files, commands and servers of a project. The servers end with it."""

    def __init__(
        self, directory: Path, settings: str, database: Database, pushpin: Pushpin
    ) -> None:
        self.directory = directory
        self._servers = ExitStack()
        server = database.postgres
        # Without the settings that the tests themselves run with.
        mine = {k: v for k, v in os.environ.items() if "EVENTSTREAM" not in k and "DJANGO" not in k}
        self.environment = {
            **mine,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)]),
            "DJANGO_SETTINGS_MODULE": settings,
            "SECRET_KEY": settings_of_tests.SECRET_KEY,  # so that sessions are valid there
            "PGDATABASE": database.name,
            "PGUSER": "postgres",
            "PGHOST": server.host,
            "PGPORT": str(server.port),
            "GRIP_URL": f"{pushpin.control_url}?key={KEY}",
        }

    def __enter__(self) -> Project:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._servers.close()

    def write(self, path: str, text: str) -> None:
        """Write a file, or add to it."""
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as opened:
            opened.write(text)

    def run(self, *command: str, text: str = "") -> str:
        """Run a program in the directory until it ends. Returns its output."""
        done = forked.run(command, self.environment, self.directory, text=text)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def manage(self, *arguments: str, text: str = "") -> str:
        return self.run(*DJANGO, *arguments, text=text)

    def shell(self, script: str) -> str:
        """Run a shell script in the directory, where ``python`` runs Django's commands."""
        interpreter = forked.interpreter(self.environment)
        python = self.directory / "bin" / "python"
        python.parent.mkdir(exist_ok=True)
        python.write_text(f'#!/bin/sh\nshift\nexec {interpreter} -W error -m django "$@"\n')
        python.chmod(0o755)
        path = f"{python.parent}:{self.environment['PATH']}"
        return self.run("env", f"PATH={path}", "sh", "-ec", script)

    def start(self, *arguments: str, ready: Callable[[], bool] | None = None) -> None:
        """Start a management command that runs until the project ends."""
        process = forked.ForkedProcess(
            arguments[0],
            [sys.executable, "-m", "django", *arguments],
            log_path=self.directory / f"{arguments[0]}.log",
            environment=self.environment,
        )
        self._servers.callback(process.kill)
        process.start(ready=ready)

    def serve(self, port: int) -> None:
        """Run the application and the publisher until the project ends."""
        self.start("runserver", f"127.0.0.1:{port}", "--noreload", ready=lambda: accepts(port))
        publisher = PublisherProcess(self.directory / "publisher.log", self.environment)
        self._servers.callback(publisher.kill)
        publisher.lead()
