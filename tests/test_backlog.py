"""Very many events, and very many channels."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pg_eventstream.demo.processes import wait_until

from .conftest import THOROUGH, Database, PublisherProcess
from .sse_client import SSEClient

EVENTS = 1_000_000 if THOROUGH else 250_000
#: 15 seconds for a million.
FIRST_WITHIN = 5 + EVENTS / 100_000
#: What a publisher takes without any backlog is about 50 MB.
MEMORY_MB = 160


@pytest.mark.alone
@pytest.mark.faults
def test_backlog_of_very_many_events_starts_at_once_and_in_bounded_memory(
    database: Database,
    new_publisher: Callable[..., PublisherProcess],
    stream: Callable[..., SSEClient],
    channel: str,
) -> None:
    client = stream(channel).wait_open()
    database.send(channel, "first")
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data)"
        " SELECT %s || (n %% 1000), 'event ' || n FROM generate_series(1, %s) AS n",
        [f"{channel}-", EVENTS - 1],
    )
    publisher = new_publisher()
    started = time.monotonic()
    publisher.start()
    client.wait_count(1, timeout=60)
    first_after = time.monotonic() - started
    acknowledged = "SELECT coalesce(max(position), 0) FROM pg_eventstream_proxy"
    wait_until(lambda: database.value(acknowledged) >= 100_000, timeout=60, check=0.2)
    peak = _peak_memory_mb(publisher.pid)
    print(f"first event after {first_after:.1f} s, peak memory {peak:.0f} MB")  # noqa: T201
    assert first_after < FIRST_WITHIN
    assert peak < MEMORY_MB


def test_ten_thousand_channels_are_published_in_bounded_memory(
    database: Database,
    publisher: PublisherProcess,
    stream: Callable[..., SSEClient],
    channel: str,
) -> None:
    few = [f"{channel}-{n}" for n in (0, 4_711, 9_999)]
    clients = [stream(name).wait_open() for name in few]
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data)"
        " SELECT %s || (n %% 10000), n / 10000 FROM generate_series(0, 99999) AS n",
        [f"{channel}-"],
    )
    for name, client in zip(few, clients, strict=True):
        events = client.wait_count(10, timeout=60)
        assert [event.data for event in events] == [str(n) for n in range(10)]
        assert [event.eids for event in events] == [{name: n} for n in range(1, 11)]
    for name, client in zip(few, clients, strict=True):
        database.send(name, "live")
        assert client.wait_count(11, timeout=5)[-1].data == "live"
    assert _peak_memory_mb(publisher.pid) < MEMORY_MB


def _peak_memory_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
