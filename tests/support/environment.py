"""Shared by all tests of a run: a directory, a key, and the environment of processes."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from pg_eventstream.servers.pushpin import Pushpin

KEY = secrets.token_hex(24)
#: Whether to repeat faults often enough to find rare errors (`make test-faults`).
THOROUGH = bool(os.environ.get("PG_EVENTSTREAM_TEST_THOROUGH"))
#: Bytes of memory for the files of a run.
_ENOUGH = 4 << 30
_MEMORY = Path("/dev/shm")


def _parent() -> str:
    """Memory, if there is enough of it: creating and dropping databases costs far less there."""
    if THOROUGH or not _MEMORY.is_dir():
        return "/tmp"
    found = os.statvfs(_MEMORY)
    is_enough = found.f_bavail * found.f_frsize >= _ENOUGH
    return str(_MEMORY) if is_enough and not found.f_flag & os.ST_NOEXEC else "/tmp"


directory = tempfile.TemporaryDirectory(prefix="pg_eventstream-", dir=_parent())
DIRECTORY = Path(directory.name)
IN_MEMORY = DIRECTORY.is_relative_to(_MEMORY)


def child_environment(pushpin: Pushpin | None = None, **more: str) -> dict[str, str]:
    environment = {**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:pg_eventstream"}
    if pushpin is not None:
        environment |= publishes_to(pushpin.control_url)
    return {**environment, **more}


def publishes_to(*control_urls: str) -> dict[str, str]:
    """The environment of a publisher to the proxies with these control ports."""
    return {"PG_EVENTSTREAM_TEST_GRIP_URL": " ".join(f"{url}?key={KEY}" for url in control_urls)}


@contextmanager
def settings_everywhere(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[None]:
    """Override settings in this process, and in the processes that it starts."""
    monkeypatch.setenv("PG_EVENTSTREAM_TEST_SETTINGS", json.dumps(settings))
    with override_settings(**settings):
        yield
