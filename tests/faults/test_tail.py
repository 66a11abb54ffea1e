"""The tail shows every event once and in order, whatever happens to its connections."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pg_eventstream.servers.processes import Process, wait_until
from tests.support.chance import seeded
from tests.support.database import Database
from tests.support.environment import THOROUGH, child_environment
from tests.support.faults import terminating_backends
from tests.support.load import Load
from tests.support.publisher import NewPublisher

pytestmark = pytest.mark.faults

EVENTS = 20_000 if THOROUGH else 800
CUTS = 20 if THOROUGH else 2
SESSION = "pg_eventstream tail"


@pytest.mark.faults
@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_tail_leaves_nothing_out_and_repeats_nothing_under_load(
    database: Database, new_publisher: NewPublisher, tmp_path: Path
) -> None:
    """While sessions end at random: its own, the publisher's, the senders'."""
    chance = seeded()
    new_publisher().lead()
    shown = tmp_path / "shown.jsonl"
    command = "eventstream_tail --all --since earliest --json"
    tail = Process(
        "the tail",
        ["sh", "-c", f"exec {sys.executable} -m django {command} > {shown} 2> {tmp_path}/said"],
        log_path=None,
        environment=child_environment(),
    )
    tail.start(ready=shown.exists)
    try:
        load = Load(database, "a", pause=0.002, seed=chance.randrange(1000), persistent=True)
        with terminating_backends(database, chance) as ended, load.running():
            wait_until(
                lambda: len(load.committed) > EVENTS and ended.count(SESSION) >= CUTS, timeout=500
            )
        load.settle()
        wait_until(
            lambda: shown.read_text().count("\n") >= len(load.committed), timeout=60, check=0.2
        )
    finally:
        tail.kill()
    events = [json.loads(line) for line in shown.read_text().splitlines()]
    assert [event["id"] for event in events] == [f"a:{n + 1}" for n in range(len(load.committed))]
    assert sorted(event["data"] for event in events) == sorted(load.committed)
    assert "connected again" in (tmp_path / "said").read_text()
