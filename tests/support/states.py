"""States of an event stream, as `pg_eventstream.operate.state.read_state` returns them."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from pg_eventstream.consumers.progress import ConsumerState, Holder
from pg_eventstream.operate.state import (
    OldestTransaction,
    ProxyState,
    Pruning,
    Session,
    State,
    TableState,
    Waiting,
)

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
PROXY = ProxyState(
    name="http://proxy:5561", configured=True, position=90, lag_events=10, lag_seconds=1.5
)
CONSUMER = ConsumerState(
    name="stock",
    declared=True,
    lag_events=3,
    lag_seconds=0.5,
    free_lag_seconds=0.5,
    processes=2,
    holders=[Holder(name="host:7/a", slots=[*range(16)], heartbeat_seconds=7.0)],
    heartbeat_seconds=7.0,
)
HEALTHY = State(
    at=NOW,
    alias="default",
    database="app@db:5432",
    server_version="18.0",
    is_standby=False,
    clock_seconds=0.0,
    listens=True,
    position=100,
    incarnation=0,
    waiting=Waiting(count=2, oldest_seconds=0.5),
    leader=Session(pid=1, name="host:1", address=None, since=NOW),
    standbys=[Session(pid=2, name="host:2", address=None, since=NOW)],
    publisher="host:1",
    heartbeat_seconds=4.0,
    leading_since=NOW,
    report={"listens": True},
    awake=False,
    proxies=[PROXY],
    consumers=[CONSUMER],
    oldest_transaction=OldestTransaction(kind="session", name="3", seconds=7.0, transactions=4),
    pruning=Pruning(
        oldest_seconds=80_000.0, retention_seconds=86_400.0, ran_seconds=20.0, behind_seconds=0.0
    ),
    queue_usage=0.01,
    tables=[
        TableState(
            name="pg_eventstream_event", bytes=8192, live_rows=100, dead_rows=5, last_vacuum=None
        )
    ],
    doctor={"ok": True, "findings": [], "seconds": {"received": 0.25}},
    doctor_seconds=60.0,
)


def state(**changes: Any) -> State:
    """A healthy state with these changes."""
    return replace(HEALTHY, **changes)
