"""Distributes the slots of consumers among processes, by session locks.

Each process that runs a consumer holds a lock of its own in share mode, so that all can count the
processes and take a fair part of the slots. A process that dies loses its locks with its session,
and others take its slots soon. The locks only decide who works: that each event is
handled once is decided by the checkpoints.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from typing import Any

import psycopg

from .. import instruments
from ..errors import EventStreamError
from ..postgres.listener import BELL, CONSUMERS, NEWS, Listener
from ..postgres.locks import (
    CONSUMER_LOCKS,
    LOCK_SPACE,
    MEMBER,
    consumer_lock,
    owner_of,
)
from ..postgres.sequence import SEQUENCE_UNLESS_LED, UNKNOWN
from ..postgres.slots import SLOTS
from ..postgres.watchdog import WatchedConnection
from ..rarely import Rarely
from .runner import Runner

logger = logging.getLogger(__name__)

_LOCKS = f"SELECT lock, pid = pg_backend_pid() FROM {CONSUMER_LOCKS} AS held"  # noqa: S608
_may_not_sequence = Rarely()


class NeedsDirectConnection(EventStreamError):
    """Consumers hold locks of a session, which a pooler does not keep."""


class Share:
    """Holds the locks of this process's slots, on a connection of its own."""

    def __init__(self, connection: WatchedConnection, runners: list[Runner]) -> None:
        if connection.shared:
            raise NeedsDirectConnection(
                "Consumers need a connection to PostgreSQL that keeps its session. This one goes"
                " through a pooler in transaction mode (PgBouncer), which would give their locks to"
                " others. Pass a direct connection: --database ALIAS, or --dsn."
            )
        self._connection = connection
        self._runners = {runner.consumer_id: runner for runner in runners}
        self._held: dict[int, set[int]] = defaultdict(set)
        self._may_sequence = True
        self.listener = Listener(connection, NEWS, BELL, CONSUMERS)
        for runner in runners:
            self._lock("pg_advisory_lock_shared", runner.consumer_id, [MEMBER])

    def close(self) -> None:
        self.listener.close()

    def sequence(self) -> int:
        """Put events in order, if no publisher leads, outside of any handler's transaction."""
        if not self._may_sequence:
            return 0
        try:
            row = self._connection.execute(
                SEQUENCE_UNLESS_LED,
                [UNKNOWN.as_known],
            ).fetchone()
        except psycopg.errors.InsufficientPrivilege:
            self._may_sequence = False
            if _may_not_sequence():
                logger.info(
                    "consumers: this role may not sequence events, so the publisher must",
                    extra={"event": "may-not-sequence"},
                )
            return 0
        sequenced = int(row[1]) if row else 0
        if sequenced:
            instruments.sequenced_events.inc(sequenced)
        return sequenced

    def balance(self) -> None:
        """Take free slots, or give some back, so that each process has a fair part."""
        self._unlock_given_back()
        taken: defaultdict[int, set[int]] = defaultdict(set)
        members: defaultdict[int, int] = defaultdict(int)
        for lock, is_own in self._connection.execute(_LOCKS).fetchall():
            consumer_id, slot = owner_of(lock)
            if slot == MEMBER:
                members[consumer_id] += 1
            elif not is_own:
                taken[consumer_id].add(slot)
        for consumer_id, runner in self._runners.items():
            held = self._held[consumer_id]
            fair = -(-SLOTS // max(1, members[consumer_id]))
            free = {*range(SLOTS)} - taken[consumer_id] - held
            if len(held) < fair and free:
                wanted = random.sample(sorted(free), min(len(free), fair - len(held)))
                got = self._lock("pg_try_advisory_lock", consumer_id, wanted)
                held |= got
                runner.grant(got)
            elif len(held) > fair:
                runner.ask_back(random.sample(sorted(held), len(held) - fair))

    def _unlock_given_back(self) -> None:
        for consumer_id, runner in list(self._runners.items()):
            held = self._held[consumer_id]
            # One whose rows are gone gives nothing back. They can come back, for other processes.
            slots = set(held) if runner.gone else runner.given_back() & held
            self._lock("pg_advisory_unlock", consumer_id, sorted(slots))
            held -= slots
            if runner.gone:
                self._lock("pg_advisory_unlock_shared", consumer_id, [MEMBER])
                del self._runners[consumer_id]

    def _lock(self, function: str, consumer_id: int, slots: list[int]) -> set[int]:
        if not slots:
            return set()
        rows: list[tuple[Any, ...]] = self._connection.execute(
            f"SELECT slot, {function}({LOCK_SPACE}, %s + slot)::text"  # noqa: S608
            "  FROM unnest(%s::int[]) AS slot",
            [consumer_lock(consumer_id, 0), slots],
        ).fetchall()
        return {slot for slot, result in rows if result == "true"}
