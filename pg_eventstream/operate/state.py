"""The state of the event stream, read from what the tables and PostgreSQL's own views hold.

One set of queries feeds the status command, the admin, the metrics and the doctor. They are cheap
on a large database: they count nothing that can be large, and read the stream only by its keys.
What a role may not see is None.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from typing import Any

import psycopg
from django.apps import apps
from django.core.checks import CheckMessage
from django.db import DatabaseError, connections

from ..checks.tables import check_schema
from ..conf import conf, proxy_name
from ..consumers.declare import Consumer, discover
from ..consumers.progress import ConsumerState, read_consumers
from ..grip.proxy import Proxy, Refused, Unavailable
from ..limits import LIMITS, Limits
from ..liveness import PUBLISHER as LAST_PUBLISHER
from ..postgres import monitor
from ..postgres.connector import Connector, fetch_one
from ..postgres.report import DOCTOR, PRUNER, PUBLISHER
from ..postgres.slots import HANDLED_BY_ALL
from . import queries
from .parts import (
    MOST_COUNTED,
    OldestTransaction,
    Problem,
    ProxyState,
    Pruning,
    Session,
    State,
    TableState,
    Waiting,
)

__all__ = [
    "MOST_COUNTED",
    "OldestTransaction",
    "Problem",
    "ProxyState",
    "Pruning",
    "Session",
    "State",
    "TableState",
    "Waiting",
    "read_state",
]

# Of the newest events, so many are looked up in the stream: first in its newest part, and those
# that are not there in a larger part.
_NEWEST, _NEAR_PART, _FAR_PART = 1000, 3000, 200_000
_LEAST = -(2**63)


def read_state(
    database: str | Connector | None = None, *, ask_proxies: bool = False, limits: Limits = LIMITS
) -> State:
    """Read the state of the events' database, over a connection of its own.

    ``database`` is an alias or where to connect; by default ``EVENTSTREAM_DATABASE``. With
    ``ask_proxies``, each configured proxy gets an empty batch, which takes up to 13 seconds where
    it does not answer.

    Raises `psycopg.Error` if the database cannot be read, and `ImproperlyConfigured` if a setting
    is wrong.
    """
    connector = (
        database
        if isinstance(database, Connector)
        else Connector(database or conf.database, limits=limits)
    )
    patience = connector.limits.command_patience
    with connector.connect("status", patience=patience) as connection:
        read = _Reader(connection)
        began = time.time()
        at, version, is_standby, queue_usage = fetch_one(connection, queries.SERVER)
        clock_seconds = at.timestamp() - (began + time.time()) / 2
        reports = read.reports()
        publisher_report, _ = reports.get(PUBLISHER, ({}, None))
        pruner_report, pruner_seconds = reports.get(PRUNER, ({}, None))
        doctor, doctor_seconds = reports.get(DOCTOR, (None, None))
        position, incarnation = read.position()
        # It is of another stream if the tables were emptied since.
        pruned = int(pruner_report.get("position", _LEAST))
        pruned = pruned if pruned <= position else _LEAST
        waiting = read.waiting()
        name, leading_since, heartbeat_seconds = read.publisher()
        leader, standbys = read.sessions(name, leading_since)
        awake, hubs, elsewhere = read.processes()
        declared, consumers_error = _discover()
        return State(
            at=at,
            alias=connector.alias,
            database=str(connector),
            server_version=version,
            is_standby=is_standby,
            clock_seconds=clock_seconds,
            listens=not connection.shared and not is_standby,
            problems=_check(connector.alias),
            position=position,
            incarnation=incarnation,
            waiting=waiting,
            unseen=read.unseen(waiting, pruned),
            leader=leader,
            standbys=standbys,
            publisher=name,
            heartbeat_seconds=heartbeat_seconds,
            leading_since=leading_since,
            report=publisher_report,
            may_sequence=read.may_sequence(publisher_report.get("role")),
            elsewhere=elsewhere,
            awake=awake if leader else None,
            proxies=read.proxies(waiting, pruned, publisher_report, ask_proxies),
            hubs=hubs,
            consumers=read.consumers(declared, pruned),
            consumers_error=consumers_error,
            oldest_transaction=read.oldest_transaction(),
            pruning=read.pruning(pruned, pruner_seconds),
            queue_usage=queue_usage,
            tables=read.tables(),
            doctor=doctor,
            doctor_seconds=doctor_seconds,
            unreadable=read.unreadable,
        )


class _Reader:
    """Asks the queries over one connection, and makes objects of the rows."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self.unreadable: list[str] = []

    def _fetch(self, query: str, params: Any = None, table: str = "") -> list[tuple[Any, ...]]:
        rows = monitor.fetch(self._connection, query, params)
        if rows is None and table:
            self.unreadable.append(table)
        return rows or []

    def reports(self) -> dict[str, tuple[dict[str, Any], float]]:
        return {name: (content, age) for name, content, age in self._fetch(queries.REPORTS)}

    def position(self) -> tuple[int, int]:
        rows = self._fetch(queries.POSITION)
        return (rows[0][0], rows[0][1]) if rows else (0, 0)

    def waiting(self) -> Waiting:
        rows = self._fetch(queries.WAITING, {"most": MOST_COUNTED}, "outbox")
        count, oldest = rows[0] if rows else (None, None)
        return Waiting(count=count, oldest_seconds=_not_negative(oldest))

    def unseen(self, waiting: Waiting, pruned: int) -> int | None:
        if waiting.count is None or waiting.count >= MOST_COUNTED:
            return None
        found = self._fetch(queries.LAST_ID)
        if not found or not found[0][1]:
            return None
        last_id = found[0][0] or 0
        params = {"most": MOST_COUNTED, "pruned": pruned, "part": _NEAR_PART}
        near = {**params, "after": last_id - _NEWEST}
        rows = monitor.fetch(self._connection, queries.UNSEEN_NEAR, near)
        if rows:
            far = {**params, "ids": [row[0] for row in rows], "part": _FAR_PART}
            rows = monitor.fetch(self._connection, queries.UNSEEN_FAR, far)
        return None if rows is None else len(rows)

    def publisher(self) -> tuple[str | None, datetime | None, float | None]:
        rows = self._fetch(LAST_PUBLISHER, table="publisher")
        if not rows:
            return None, None, None
        name, since, heartbeat = rows[0]
        return name, since, _not_negative(heartbeat)

    def sessions(
        self, name: str | None, leading_since: datetime | None
    ) -> tuple[Session | None, list[Session]]:
        leader, standbys = None, []
        for pid, application, address, since, leads in self._fetch(queries.SESSIONS):
            session = Session(pid=pid, name=application, address=address, since=since)
            if not leads:
                standbys.append(session)
                continue
            # The table has the name of the previous leader until this one registers.
            registered = leading_since is not None and (since is None or leading_since >= since)
            leader = Session(
                pid=pid,
                name=name if name and registered else application,
                address=address,
                since=since,
            )
        return leader, standbys

    def processes(self) -> tuple[bool, int, list[str]]:
        rows = self._fetch(queries.PROCESSES)
        return (rows[0][0], rows[0][1], rows[0][2]) if rows else (False, 0, [])

    def may_sequence(self, role: Any) -> bool | None:
        rows = self._fetch(queries.MAY_SEQUENCE, [role]) if isinstance(role, str) else []
        return rows[0][0] if rows else None

    def proxies(
        self, waiting: Waiting, pruned: int, report: dict[str, Any], ask: bool
    ) -> list[ProxyState]:
        known = {
            row[0]: row[1:] for row in self._fetch(queries.PROXIES, {"pruned": pruned}, "proxy")
        }
        configured = {proxy_name(config): config for config in conf.grip_proxies}
        troubles = report.get("proxies")
        troubles = troubles if isinstance(troubles, dict) else {}
        states = []
        for name in sorted({*known, *configured}):
            position, lag, oldest = known.get(name, (None, None, None))
            ages = [age for age in (oldest if lag else None, waiting.oldest_seconds) if age]
            answer = _ask(configured[name]) if ask and name in configured else (None, None)
            states.append(
                ProxyState(
                    name=name,
                    configured=name in configured,
                    position=position,
                    lag_events=(
                        None
                        if lag is None or waiting.count is None
                        else max(0, lag) + waiting.count
                    ),
                    lag_seconds=None if lag is None else max([0.0, *ages]),
                    trouble=(troubles.get(name) or {}).get("trouble"),
                    reachable=answer[0],
                    answer=answer[1],
                )
            )
        return states

    def consumers(self, declared: dict[str, Consumer] | None, pruned: int) -> list[ConsumerState]:
        found = read_consumers(self._connection, declared, pruned=pruned)
        if found is None and declared:
            self.unreadable.append("consumer")
        return found or []

    def oldest_transaction(self) -> OldestTransaction | None:
        for kind, name, seconds, transactions in self._fetch(queries.OLDEST_TRANSACTION):
            return OldestTransaction(
                kind=kind, name=name, seconds=_not_negative(seconds), transactions=transactions
            )
        return None

    def pruning(self, pruned: int, ran_seconds: float | None) -> Pruning:
        retention = None if conf.retention is None else conf.retention.total_seconds()
        oldest, behind = None, 0.0
        if retention is not None:
            params = {"pruned": pruned, "proxied": bool(conf.grip_proxies)}
            # A role that may not see how far consumers are takes it as held.
            [(handled,)] = self._fetch(HANDLED_BY_ALL) or [(_LEAST,)]
            for position, oldest, is_free in self._fetch(queries.OLDEST_KEPT, params):
                is_held = handled is not None and position > handled
                hold = conf.consumer_hold.total_seconds() if is_held else 0.0
                behind = max(0.0, oldest - max(retention, hold)) if is_free else 0.0
        return Pruning(
            oldest_seconds=_not_negative(oldest),
            retention_seconds=retention,
            ran_seconds=_not_negative(ran_seconds),
            behind_seconds=behind,
        )

    def tables(self) -> list[TableState]:
        models = apps.get_app_config("pg_eventstream").get_models()
        names = [model._meta.db_table for model in models]
        return [
            TableState(
                name=name, bytes=size, live_rows=live, dead_rows=dead, last_vacuum=last_vacuum
            )
            for name, size, live, dead, last_vacuum in self._fetch(queries.TABLES, [names])
        ]


def _check(alias: str) -> list[Problem]:
    """What the checks of the tables find, over another connection, as Django opens them."""
    # Not the caller's, which could be in a transaction that has failed.
    try:
        with closing(connections[alias].copy()) as connection:
            messages: Sequence[CheckMessage] = [*check_schema(connection)]
    except DatabaseError as e:
        if isinstance(e.__cause__, psycopg.Error):
            raise e.__cause__ from e
        raise
    return [
        Problem(id=message.id or "", message=message.msg, hint=message.hint)
        for message in messages
        if not message.is_silenced()
    ]


def _discover() -> tuple[dict[str, Consumer] | None, str | None]:
    """The consumers in the code, or why it cannot be imported."""
    try:
        return discover(), None
    except Exception as e:  # noqa: BLE001  (it is the project's code)
        return None, f"{type(e).__name__}: {e}"


def _ask(config: dict[str, Any]) -> tuple[bool, str | None]:
    """Whether the control port of a proxy accepts a batch, which is empty."""
    proxy = Proxy(config)
    try:
        proxy.post(b'{"items": []}')
    except Refused:
        pass  # some proxies take no empty batch; it has answered, and has accepted the key
    except Unavailable as e:
        return False, str(e)
    finally:
        proxy.close()
    return True, None


def _not_negative(seconds: float | None) -> float | None:
    """An age, which is below zero for an event that was committed during the statement."""
    return None if seconds is None else max(0.0, seconds)
