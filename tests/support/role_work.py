"""The complete work of each role, on a database that contains a bit of everything.

Each function takes the address of the database, which includes the role.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from django.db import connections
from django.test import override_settings

from pg_eventstream import liveness
from pg_eventstream.consumers import ConsumedEvent, Consumer, Retry, checkpoints, consumer
from pg_eventstream.consumers.declare import _declared
from pg_eventstream.consumers.runner import Runner
from pg_eventstream.consumers.waiting import wait
from pg_eventstream.limits import LIMITS
from pg_eventstream.operate.state import read_state
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.postgres.report import write_report
from pg_eventstream.postgres.slots import SLOTS
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.publisher.pruner import Pruner
from pg_eventstream.streams.hub import Hub, _Reader
from pg_eventstream.streams.replay import replay

_numbers = itertools.count()


# A consumer holds the old events for so long, which is over.
_held_too_long = override_settings(EVENTSTREAM_CONSUMER_HOLD=86_401)


@_held_too_long
def publish(dsn: str) -> None:
    Publisher(Connector("default", dsn)).run_once()
    _require_pruned(dsn)
    _require_report(dsn)


@_held_too_long
def prune_only(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        Pruner(connection).run_once()
    _require_pruned(dsn)
    _require_report(dsn)


def _require_pruned(dsn: str) -> None:
    """A role that may not see what consumers have handled does the rest of its work."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        _require(
            not connection.execute(
                "SELECT FROM pg_eventstream_stream WHERE channel = 'old'"
            ).fetchall()
        )


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


@contextmanager
def _in_django(dsn: str) -> Iterator[None]:
    """Django's connection has the role."""
    wrapper = connections["default"]
    owner = wrapper.settings_dict["USER"]
    try:
        connections.close_all()
        wrapper.settings_dict["USER"] = psycopg.conninfo.conninfo_to_dict(dsn)["user"]
        yield
    finally:
        connections.close_all()
        wrapper.settings_dict["USER"] = owner


def serve(dsn: str) -> None:
    with _in_django(dsn):
        replay({"old": 0, "new": 0})
        liveness._check_state()
        with psycopg.connect(dsn, autocommit=True) as connection:
            reader = _Reader(Hub("default"))
            reader.position = 0
            reader._read_page(connection)


def consume(dsn: str) -> None:
    """A consumer is registered, and fails; another version of it with other channels handles a
    parked event again, and what is new.
    """

    @consumer(f"role{next(_numbers)}", start="earliest", retry=Retry(1))
    def fail(event: ConsumedEvent) -> None:
        raise ValueError

    handled: list[ConsumedEvent] = []
    succeed = Consumer(
        fail.name, handled.append, ("old", "new"), (), "earliest", Retry(1), "park", 1, None
    )
    del _declared[fail.name]
    _sequence_as_owner(dsn)
    with _in_django(dsn), psycopg.connect(dsn, autocommit=True) as connection:
        _run(connection, fail)
        connection.execute("UPDATE pg_eventstream_parked SET retry = true")
        _run(connection, succeed)
        row = connection.execute(
            "SELECT count(*) FROM pg_eventstream_parked AS p JOIN pg_eventstream_consumer AS k"
            " ON k.id = consumer_id WHERE name = %s",
            [fail.name],
        ).fetchone()
        _require(handled and row == (0,))
        _require(wait(succeed, 0))
        for event in ("a:1", "a:2"):  # on which a handler works for long
            write_report(connection, "consumer 1", {"event": event})
            found = connection.execute(
                "SELECT content ->> 'event' FROM pg_eventstream_report WHERE name = 'consumer 1'"
            ).fetchone()
            _require(found == (event,))


def _run(connection: psycopg.Connection[Any], one: Consumer) -> None:
    consumer_id = checkpoints.register(connection, one)
    runner = Runner(one, consumer_id, "default", "host:1/a", LIMITS)
    runner.grant(range(SLOTS))
    while runner.step() == 0:
        pass
    checkpoints.beat(connection, [(consumer_id, 0)], "host:1/a")
    runner.close()


def await_consumer(dsn: str) -> None:
    late = Consumer("late", print, (), (), "earliest", Retry(), "park", 1, None)
    _sequence_as_owner(dsn)
    with _in_django(dsn):
        _require(not wait(late, 0))


def _sequence_as_owner(dsn: str) -> None:
    sequence(psycopg.conninfo.make_conninfo(dsn, user="postgres"))


def sequence(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_eventstream_sequence()")


def send(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids, meta)"
            " VALUES ('new', 'type', '{}', '{}', '{}')"
        )
