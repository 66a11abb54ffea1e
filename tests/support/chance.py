"""Random numbers that can be repeated."""

from __future__ import annotations

import os
import random
import time


def seeded() -> random.Random:
    """A generator whose seed is printed, and taken from the environment if it is set there."""
    seed = os.environ.get("PG_EVENTSTREAM_TEST_SEED", str(time.time_ns()))
    print(f"PG_EVENTSTREAM_TEST_SEED={seed}")  # noqa: T201  (shown if the test fails)
    return random.Random(seed)
