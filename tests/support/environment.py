"""Shared by all tests of a run: a directory, a key, and the environment of processes."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from pg_eventstream.servers.pushpin import Pushpin

KEY = secrets.token_hex(24)
#: Whether to repeat faults often enough to find rare errors (`make test-faults`).
THOROUGH = bool(os.environ.get("PG_EVENTSTREAM_TEST_THOROUGH"))

directory = tempfile.TemporaryDirectory(prefix="pg_eventstream-", dir="/tmp")
DIRECTORY = Path(directory.name)


def child_environment(pushpin: Pushpin | None = None, **more: str) -> dict[str, str]:
    environment = {**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:pg_eventstream"}
    if pushpin is not None:
        environment |= publishes_to(pushpin.control_url)
    return {**environment, **more}


def publishes_to(*control_urls: str) -> dict[str, str]:
    """The environment of a publisher to the proxies with these control ports."""
    return {"PG_EVENTSTREAM_TEST_GRIP_URL": " ".join(f"{url}?key={KEY}" for url in control_urls)}
