"""PostgreSQL, or the network to it, falls silent; no one waits for a response without end.

The network between them still answers keepalives, as a proxy or a load balancer does.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from django.db import connections
from django.test import override_settings

from pg_eventstream import send_event
from pg_eventstream.limits import Limits
from pg_eventstream.postgres import watchdog as silence
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.postgres.watchdog import WatchedConnection
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.servers.processes import wait_until
from tests.support.application import Serve
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.faults import OURS, locked, suspended
from tests.support.load import Load
from tests.support.network import Network
from tests.support.publisher import NewPublisher
from tests.support.sse_client import OpenStream, SSEClient

pytestmark = pytest.mark.faults


#: The length of a silence that ends without help.
PAUSE = 30


@pytest.fixture
def network(database: Database) -> Iterator[Network]:
    """The network to PostgreSQL."""
    with Network(database.postgres.port) as between:
        yield between


@pytest.fixture
def impatient() -> Limits:
    return Limits(silence=0.4, look=0.1)


def through(network: Network, database: Database) -> str:
    return f"postgresql://postgres@127.0.0.1:{network.port}/{database.name}?connect_timeout=2"


@pytest.fixture
def arun() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor() as threads:
        yield threads.submit


# One connection


def test_answer_that_was_lost_is_not_waited_for_and_the_session_is_ended(
    database: Database, network: Network, impatient: Limits
) -> None:
    with Connector("default", through(network, database), impatient).connect("test") as connection:
        connection.execute("SELECT pg_advisory_lock(1)")
        network.forget()
        start = time.monotonic()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
        assert time.monotonic() < start + 10
    # Its end of the connection is still open and held the lock.
    wait_until(lambda: database.value("SELECT pg_try_advisory_xact_lock(1)"), timeout=10)


def test_statement_that_works_or_waits_is_waited_for(
    database: Database,
    network: Network,
    impatient: Limits,
    arun: Callable[..., Future[Any]],
) -> None:
    with Connector("default", through(network, database), impatient).connect("test") as connection:
        connection.execute("SELECT pg_sleep(1.5)")
        with locked(database, "LOCK TABLE pg_eventstream_cursor"):
            waiting = arun(connection.execute, "SELECT pg_eventstream_sequence()")
            assert wait([waiting], timeout=1.5).not_done
        assert waiting.result(10).fetchone() == (0,)


@dataclass(frozen=True)
class Login:
    """How the role {login} becomes {other}, if it does. Neither is a member of another role."""

    sql: str
    options: dict[str, str] = field(default_factory=dict)
    is_other: bool = True


LOGINS = {
    "assume_role": Login("GRANT {other} TO {login}", {"assume_role": "{other}"}),
    "assume_role, not inherited": Login(
        "ALTER ROLE {login} NOINHERIT; GRANT {other} TO {login}", {"assume_role": "{other}"}
    ),
    "assume_role of a superuser": Login("ALTER ROLE {login} SUPERUSER", {"assume_role": "{other}"}),
    "-c role": Login("GRANT {other} TO {login}", {"options": "-c role={other}"}),
    "ALTER ROLE SET role": Login("GRANT {other} TO {login}; ALTER ROLE {login} SET role = {other}"),
    "both": Login(
        "GRANT {other} TO {login}; ALTER ROLE {login} SET role = {other}",
        {"assume_role": "{other}"},
    ),
    "nothing": Login("SELECT 1", is_other=False),
    "track_activities": Login("ALTER ROLE {login} SET track_activities = off", is_other=False),
    "track_activities, assume_role": Login(
        "GRANT {other} TO {login}; ALTER ROLE {login} SET track_activities = off",
        {"assume_role": "{other}"},
    ),
}


ORDINARILY = ("assume_role, not inherited", "ALTER ROLE SET role", "track_activities")


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name in ORDINARILY else pytest.mark.thorough)
        for name in LOGINS
    ]
)
def session_as(
    request: pytest.FixtureRequest, database: Database, network: Network, impatient: Limits
) -> Iterator[WatchedConnection]:
    """A connection over the network. The server may hide its session from its own role."""
    login = LOGINS[request.param]
    names = {name: f"{name}_{database.name}" for name in ("login", "other")}
    for name in names.values():
        database.execute(f"CREATE ROLE {name} LOGIN")
    database.execute(login.sql.format(**names))
    alias = names["login"]
    connections.settings[alias] = {
        **connections.settings["default"],
        "USER": names["login"],
        "HOST": "127.0.0.1",
        "PORT": network.port,
        "OPTIONS": {name: value.format(**names) for name, value in login.options.items()},
    }
    try:
        with Connector(alias, limits=impatient).connect("test") as connection:
            row = connection.execute("SELECT current_user").fetchone()
            assert row == (names["other" if login.is_other else "login"],)
            yield connection
    finally:
        del connections.settings[alias]
        database.execute("DROP ROLE {login}, {other}".format(**names))


def test_session_whose_role_may_not_be_told_of_it_is_not_given_up_while_it_works(
    session_as: WatchedConnection,
) -> None:
    session_as.execute("SELECT pg_sleep(1.5)")


def test_session_whose_role_may_not_be_told_of_it_is_given_up_when_its_answer_is_lost(
    database: Database, network: Network, session_as: WatchedConnection
) -> None:
    session_as.execute("SELECT pg_advisory_lock(1)")
    network.forget()
    with pytest.raises(psycopg.OperationalError):
        session_as.execute("SELECT 1")
    wait_until(lambda: database.value("SELECT pg_try_advisory_xact_lock(1)"), timeout=10)


@pytest.mark.thorough
def test_silent_server_that_cannot_be_asked_is_waited_for(
    database: Database,
    network: Network,
    impatient: Limits,
    arun: Callable[..., Future[Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Connector("default", through(network, database), impatient).connect("test") as connection:
        network.deaf()
        waiting = arun(connection.execute, "SELECT 1")
        wait_until(lambda: "cannot be asked" in caplog.text, timeout=20)
        network.heal()
        assert waiting.result(20).fetchone() == (1,)


def test_connection_that_falls_silent_while_it_is_set_up_fails(
    database: Database, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = silence.WatchedConnection.connect

    def connect_then_forget(**params: Any) -> Any:
        connection = connect(**params)
        network.forget()
        return connection

    monkeypatch.setattr(silence.WatchedConnection, "connect", connect_then_forget)
    with pytest.raises(psycopg.OperationalError):
        Connector("default", through(network, database), Limits(set_up=0.5)).connect("test")


def test_publisher_whose_connections_died_silently_continues(
    database: Database,
    network: Network,
    control: ControlPort,
    impatient: Limits,
    arun: Callable[..., Future[Any]],
) -> None:
    publisher = Publisher(Connector("default", through(network, database), impatient))
    with override_settings(EVENTSTREAM_SAFETY_POLL=0.5):
        running = arun(publisher.run)
        try:
            for n in range(1, 4):
                send_event("a", "message", n)
                # Behind it may come a hint, which has no id.
                wait_until(lambda n=n: str(n) in control.ids, timeout=60)  # type: ignore[misc]
                network.forget()
        finally:
            publisher.stop()
    running.result(20)


# Whole processes, with the real times


@pytest.mark.thorough
@pytest.mark.parametrize("fault", ["forgotten", "deaf", "deaf, then forgotten", "frozen"])
def test_clients_get_everything_when_the_database_is_heard_again(
    database: Database,
    network: Network,
    new_publisher: NewPublisher,
    stream: OpenStream,
    channel: str,
    fault: str,
) -> None:
    client = stream(channel).wait_open()
    publisher = new_publisher(f"--dsn={through(network, database)}").lead()
    load = Load(database, channel, pause=0.02)
    with load.running():
        client.wait_count(20)
        if "deaf" in fault:
            network.deaf()
            time.sleep(PAUSE)
            network.heal()
        if "forgotten" in fault:
            network.forget()
        if fault == "frozen":
            with suspended(database.postgres):
                time.sleep(PAUSE)
        # Events that the proxy had already do not count.
        heard_at = time.time() + 0.2
        client.wait_for(lambda: client.events[-1].at > heard_at, timeout=60)
        seconds = next(event.at for event in client.events if event.at > heard_at) - heard_at
        print(f"{fault}: recovered after {seconds:.1f} s\n{publisher.log}")  # noqa: T201
    load.check(client, timeout=120)
    assert seconds < 20
    assert publisher.running


@pytest.mark.thorough
def test_standby_with_another_way_to_the_database_takes_over(
    database: Database,
    network: Network,
    new_publisher: NewPublisher,
    stream: OpenStream,
    channel: str,
) -> None:
    """The server has noticed that the leader is gone; the leader has not."""
    client = stream(channel).wait_open()
    leader = new_publisher(f"--dsn={through(network, database)}").lead()
    wait_until(lambda: database.value(f"SELECT count(*) {OURS}") == 4, timeout=20)
    sessions = [pid for (pid,) in database.fetch(f"SELECT pid {OURS}")]
    standby = new_publisher()
    standby.start()
    standby.wait_for_log("standing by")
    load = Load(database, channel, pause=0.02)
    with load.running():
        client.wait_count(20)
        network.deaf()
        noticed_at = time.time()
        database.fetch("SELECT pg_terminate_backend(pid) FROM unnest(%s) AS pid", [sessions])
        standby.wait_for_log(": leading")
        client.wait_for(lambda: client.events[-1].at > noticed_at + 3, timeout=20)
        times = [noticed_at, *(e.at for e in client.events if e.at > noticed_at)]
        assert max(b - a for a, b in itertools.pairwise(times)) < 2
        network.heal()
        wait_until(lambda: "standing by" in leader.log, timeout=30)
    load.check(client)


@pytest.mark.thorough
@pytest.mark.parametrize("fault", ["deaf", "forgotten"])
def test_sigterm_ends_a_publisher_that_the_database_does_not_answer(
    database: Database, network: Network, new_publisher: NewPublisher, channel: str, fault: str
) -> None:
    publisher = new_publisher(f"--dsn={through(network, database)}").lead()
    getattr(network, {"deaf": "deaf", "forgotten": "forget"}[fault])()
    time.sleep(6)  # longer than the safety poll
    os.kill(publisher.pid, signal.SIGTERM)
    wait_until(lambda: not publisher.running, timeout=5.3)
    assert publisher.returncode == 0


@pytest.mark.thorough
@pytest.mark.parametrize("fault", ["forgotten", "deaf"])
def test_streams_of_a_server_continue_when_the_database_responds_again(
    database: Database, network: Network, serve: Serve, channel: str, fault: str
) -> None:
    way = {"HOST": "127.0.0.1", "PORT": network.port, "NAME": database.name, "USER": "postgres"}
    url = serve(DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", **way}})
    load = Load(database, channel, pause=0.02)
    with SSEClient(url, [channel]) as client:
        client.wait_open()
        with load.running():
            client.wait_count(20)
            if fault == "deaf":
                network.deaf()
                time.sleep(PAUSE)
                network.heal()
            else:
                network.forget()
            heard_at = time.time() + 0.2
            client.wait_for(lambda: client.events[-1].at > heard_at, timeout=60)
            seconds = next(e.at for e in client.events if e.at > heard_at) - heard_at
            print(f"{fault}: recovered after {seconds:.1f} s")  # noqa: T201
        load.check(client, timeout=120)
        assert client.connections == 1
        assert seconds < 20
