"""The complete work of each role, on a database that contains a bit of everything.

Each function takes the address of the database, which includes the role.
"""

from __future__ import annotations

import psycopg
from django.db import connections

from pg_eventstream import liveness
from pg_eventstream.operate.state import read_state
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.publisher.pruner import Pruner
from pg_eventstream.streams.hub import Hub, _Reader
from pg_eventstream.streams.replay import replay


def publish(dsn: str) -> None:
    Publisher(Connector("default", dsn)).run_once()
    _require_report(dsn)


def prune_only(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        Pruner(connection).run_once()
    _require_report(dsn)


def _require_report(dsn: str) -> None:
    """A role that may not write its report does the rest of its work."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        _require(
            connection.execute("SELECT FROM pg_eventstream_report WHERE name = 'pruner'").fetchall()
        )


def _require(result: object) -> None:
    if not result:
        raise psycopg.errors.InsufficientPrivilege("something was left out")


def observe(dsn: str) -> None:
    state = read_state(Connector("default", dsn))
    _require(not state.unreadable and state.waiting.count is not None)
    _require(state.publisher and state.proxies and state.report)
    _require(state.position and state.unseen is not None and state.pruning.oldest_seconds)
    _require(state.consumers and state.consumers[0].lag_events and state.consumers[0].parked)


def serve(dsn: str) -> None:
    wrapper = connections["default"]
    owner = wrapper.settings_dict["USER"]
    try:
        connections.close_all()
        wrapper.settings_dict["USER"] = psycopg.conninfo.conninfo_to_dict(dsn)["user"]
        replay({"old": 0, "new": 0})
        liveness._check_state()
        with psycopg.connect(dsn, autocommit=True) as connection:
            reader = _Reader(Hub("default"))
            reader.position = 0
            reader._read_page(connection)
    finally:
        connections.close_all()
        wrapper.settings_dict["USER"] = owner


def sequence(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_eventstream_sequence()")


def send(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids, meta)"
            " VALUES ('new', 'type', '{}', '{}', '{}')"
        )
