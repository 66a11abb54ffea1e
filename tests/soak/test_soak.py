"""The soak (``make soak``) works: some seconds of it, and its verdicts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak import figures as soak_figures
from tests.support.environment import THOROUGH

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.faults


@pytest.mark.thorough
def test_soak_of_seconds_loses_and_doubles_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak.__main__", f"--seconds={60 if THOROUGH else 8}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything arrived once, in order" in done.stdout
    assert "1 publishers killed" in done.stdout


def test_soak_tells_what_has_grown() -> None:
    samples = [{"server MB": 50 + n, "server fds": 9.0, "p50 ms": 9.0 + n % 3} for n in range(30)]
    assert soak_figures.growth(samples) == [
        "server MB: 54.5 in the first third, 74.5 in the last; it may be 1.1 times and 4 more"
    ]
