"""The test project's application servers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pg_eventstream.servers.processes import Process, accepts, free_port
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.environment import DIRECTORY, child_environment
from tests.support.forked import ForkedProcess

_PROGRAMS = {
    "asgi": "uvicorn tests.project.asgi:application --port={port} --log-level=warning",
    "wsgi": "gunicorn tests.project.wsgi --bind=127.0.0.1:{port} --threads=8",
}


def application(
    port: int,
    pushpin: Pushpin | None = None,
    *,
    kind: str = "asgi",
    log_path: Path = DIRECTORY / "app.log",
    **environment: str,
) -> Process:
    """Start a server, behind the proxy if there is one, and wait until it accepts connections."""
    process = ForkedProcess(
        f"the application server ({kind})",
        [sys.executable, "-m", *_PROGRAMS[kind].format(port=port).split()],
        log_path=log_path,
        environment=child_environment(pushpin, **environment),
    )
    process.start(ready=lambda: accepts(port))
    return process


class Serve:
    """Starts application servers without a proxy, each with its own settings."""

    def __init__(self, name: str) -> None:
        self.servers: list[Process] = []
        self._name = name

    def __call__(self, **settings: Any) -> str:
        """Start a server. Returns the URL of its endpoint."""
        port = free_port()
        server = application(
            port,
            log_path=DIRECTORY / f"direct-{self._name}-{len(self.servers)}.log",
            PG_EVENTSTREAM_TEST_SETTINGS=json.dumps(settings),
        )
        self.servers.append(server)
        return f"http://127.0.0.1:{port}/events/"

    def kill(self) -> None:
        for server in self.servers:
            server.kill()
