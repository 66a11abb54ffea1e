"""``eventstream_status`` in a process."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from tests.support import forked
from tests.support.environment import child_environment


def run_status(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Run the command. Returns its exit status and all that it says."""
    done = forked.run(
        [sys.executable, "-m", "django", "eventstream_status", *arguments],
        {**child_environment(), **environment},
        merged=True,
    )
    return done.returncode, done.stdout


def status(environment: dict[str, str]) -> tuple[int, dict[str, Any]]:
    code, output = run_status(environment, "--json")
    return code, json.loads(output)


def status_with(
    environment: dict[str, str], code: str, level: str, timeout: float = 30
) -> tuple[int, dict[str, Any]]:
    """The status, as soon as it has this finding."""
    deadline = time.monotonic() + timeout
    while True:
        exit_code, found = status(environment)
        if (code, level) in [(one["code"], one["level"]) for one in found["findings"]]:
            return exit_code, found
        assert time.monotonic() < deadline, found
