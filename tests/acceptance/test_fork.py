"""Processes that were forked from one that has used the library, and possibly still does.

For example by gunicorn --preload, Celery, or multiprocessing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.support import forked
from tests.support.database import Database
from tests.support.environment import child_environment
from tests.support.publisher import NewPublisher


def program(channel: str, use: str) -> list[str]:
    return [sys.executable, "-m", "tests.support.fork_uses", channel, use]


def all_is_well(channel: str, use: str) -> None:
    done = forked.run(program(channel, use), child_environment())
    assert done.stdout == "all is well\n", done.stderr
    assert done.returncode == 0


SELDOM = (pytest.mark.faults, pytest.mark.thorough)


@pytest.mark.parametrize(
    "use",
    [
        *("subscribe", "stream", "publish"),
        *(pytest.param(use, marks=SELDOM) for use in ("read", "asend")),
    ],
)
def test_forked_children_use_everything_while_their_parent_continues(
    database: Database, channel: str, use: str
) -> None:
    all_is_well(channel, use)


def test_streams_of_a_child_end_as_its_own_server_is_stopped(
    database: Database, channel: str
) -> None:
    all_is_well(channel, "stop a child")


@pytest.mark.faults
@pytest.mark.thorough
def test_child_does_not_end_a_session_of_its_parent(database: Database, channel: str) -> None:
    all_is_well(channel, "a statement")


def test_lead_of_a_publisher_that_was_killed_is_not_held_by_its_children(
    database: Database, new_publisher: NewPublisher, channel: str
) -> None:
    leader = subprocess.Popen(
        program(channel, "lead"), env=child_environment(), stdout=subprocess.PIPE, text=True
    )
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    try:
        leader.kill()
        leader.wait()
        new_publisher().lead()
    finally:
        leader.stdout.close()
        os.kill(child, signal.SIGKILL)
