"""A signal ends a publisher with ``--once``."""

from __future__ import annotations

import os
import signal

import pytest

from pg_eventstream import send_events
from pg_eventstream.servers.processes import wait_until
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.publisher import NewPublisher


def send(count: int, channel: str = "a") -> None:
    send_events([(channel, "message", n) for n in range(count)])


RARER = [pytest.mark.thorough, pytest.mark.faults]


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=RARER)])
def test_signal_ends_it_and_it_says_what_it_left(
    database: Database, control: ControlPort, new_publisher: NewPublisher, number: signal.Signals
) -> None:
    control.silent.set()
    send(3)
    publisher = new_publisher("--once", PG_EVENTSTREAM_TEST_GRIP_URL=control.url)
    publisher.start()
    wait_until(lambda: len(control.bodies) == 1, timeout=20)
    os.kill(publisher.pid, number)
    wait_until(lambda: not publisher.running, timeout=10)
    assert publisher.returncode == 1
    assert "3 events wait" in publisher.log
    assert control.url in publisher.log
    assert "Traceback" not in publisher.log
