"""Judges whether processes are alive, and whether they are ready, for Kubernetes and the like.

Alive means that a restart would not help. A database that is down or a proxy that is unreachable
makes it unready, because after a restart they would be so, too.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

import psycopg

from ...liveness import LATE_SECONDS
from ...postgres.connector import Connector
from ..consumer_findings import judge_consumers
from ..state import State
from .latest import Latest
from .metrics import CANNOT_READ, is_led, reason

#: A main loop that has not moved for this long is stuck, unless a statement runs that long.
_STUCK_SECONDS = 60.0
#: Probes of Kubernetes wait a second by default.
_LIVE_PATIENCE, _READY_PATIENCE = 0.7, 3.0


class Probes(Protocol):
    """Both say what is wrong, in sentences."""

    def why_not_live(self) -> list[str]: ...
    def why_not_ready(self) -> list[str]: ...


class Vitals(Protocol):
    """What a publisher knows about itself: `publisher.vitals.Vitals`."""

    @property
    def stage(self) -> Stage: ...
    @property
    def moved_at(self) -> float: ...
    @property
    def session(self) -> int | None: ...
    @property
    def listens(self) -> bool: ...
    @property
    def ended_threads(self) -> Sequence[str]: ...
    @property
    def troubles(self) -> dict[str, str]: ...


class Stage(Protocol):
    @property
    def value(self) -> str: ...


class Health:
    """``vitals`` are those of the publisher of this process, which uses ``connector``."""

    def __init__(self, vitals: Vitals, connector: Connector, state: Latest[State]) -> None:
        self._vitals = vitals
        self._connector = connector
        self._state = state
        self._at_work = Latest(self._is_at_work, seconds=10.0)

    def why_not_live(self) -> list[str]:
        """What a restart would cure. Empty if there is nothing."""
        reasons = [
            f"The thread {name!r} has ended, and the log of this process says why."
            for name in self._vitals.ended_threads
        ]
        silent = time.monotonic() - self._vitals.moved_at
        if silent > _STUCK_SECONDS and not self._is_excused():
            reasons.append(
                f"The main loop has not moved for {silent:.0f} seconds, and its session at the"
                " database does not run a statement."
            )
        return reasons

    def _is_excused(self) -> bool:
        """Whether it waits for the database, which a restart does not make faster."""
        try:
            return self._at_work.get(_LIVE_PATIENCE)
        except (psycopg.Error, TimeoutError):
            return True

    def _is_at_work(self) -> bool:
        session = self._vitals.session
        if session is None:
            # Connecting takes seconds at most. What runs through a pooler cannot be seen.
            return self._vitals.stage.value != "connecting"
        with self._connector.connect("health", patience=_READY_PATIENCE) as connection:
            row = connection.execute(
                "SELECT state FROM pg_stat_activity WHERE pid = %s", [session]
            ).fetchone()
        return row is not None and row[0] == "active"

    def why_not_ready(self) -> list[str]:
        """Why no event would get through now, or why this publisher could not take over."""
        try:
            state = self._state.get(_READY_PATIENCE)
        except CANNOT_READ as e:
            return [f"The database cannot be read: {reason(e)}"]
        reasons = _problems(state)
        match self._vitals.stage.value:
            case "leading":
                reasons += self._why_not_leading_well(state)
            case "standing by":
                reasons += _why_not_led(state)
            case _:
                reasons.append("This publisher is not connected to the database.")
        return reasons

    def _why_not_leading_well(self, state: State) -> list[str]:
        troubles = self._vitals.troubles
        reasons = [f"The proxy {name} {trouble}" for name, trouble in troubles.items()]
        reasons += [
            f"Events have waited for the proxy {proxy.name} for {proxy.lag_seconds:.0f} seconds."
            for proxy in state.proxies
            if (proxy.lag_seconds or 0) > LATE_SECONDS and proxy.name not in troubles
        ]
        if not self._vitals.listens:
            reasons.append(
                "LISTEN does not work on this publisher's connection. Connect it directly and not"
                " through a pooler, by --database or --dsn."
            )
        return reasons


class ConsumersHealth:
    """For the processes that run these consumers, which are children of the same parent.

    They are always live: the parent replaces those that end, and those whose handler takes longer
    than its ``timeout``. A handler without one may take any time.
    """

    def __init__(self, names: Collection[str], state: Latest[State]) -> None:
        self._names = names
        self._state = state

    def why_not_live(self) -> list[str]:
        return []

    def why_not_ready(self) -> list[str]:
        """Why a consumer handles no events now, or some of them not."""
        try:
            state = self._state.get(_READY_PATIENCE)
        except CANNOT_READ as e:
            return [f"The database cannot be read: {reason(e)}"]
        consumers = [consumer for consumer in state.consumers if consumer.name in self._names]
        found = judge_consumers(replace(state, consumers=consumers))
        return _problems(state) + [one.message for one in found if one.level == "broken"]


def _problems(state: State) -> list[str]:
    return [
        f"{problem.message} ({problem.id})"
        for problem in state.problems
        if ".E" in problem.id  # a warning stops no event
    ]


def _why_not_led(state: State) -> list[str]:
    if not is_led(state):
        return ["This publisher stands by, and no publisher leads."]
    if state.heartbeat_seconds is not None and state.heartbeat_seconds > LATE_SECONDS:
        return [
            f"This publisher stands by, and {state.publisher} leads, which has shown no sign of"
            f" life for {state.heartbeat_seconds:.0f} seconds."
        ]
    return []
