"""Faults of processes and of the database: at random, or at a named point."""

from __future__ import annotations

import http.client
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol

from pg_eventstream.postgres.locks import LOCK_SPACE, PRUNE_LOCK, SEQUENCE_LOCK
from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import children, wait_until
from tests.support.database import Database
from tests.support.environment import KEY
from tests.support.http_service import HttpService, body_of, respond
from tests.support.load import Load
from tests.support.publisher import NewPublisher, PublisherProcess

OURS = (
    "FROM pg_stat_activity WHERE datname = current_database()"
    " AND starts_with(application_name, 'pg_eventstream ')"
)
#: Makes every session that sequences wait before it has done anything.
SEQUENCING = f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {SEQUENCE_LOCK})"


class HasPid(Protocol):
    @property
    def pid(self) -> int: ...


@contextmanager
def suspended(*processes: HasPid) -> Iterator[None]:
    """Stop processes, and continue them afterwards. The kernel still acknowledges their data."""
    pids = [process.pid for process in processes]
    for process in processes:
        if isinstance(process, Postgres):
            pids += children(process.pid)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def locked(database: Database, statement: str, params: Any = None) -> Iterator[None]:
    """Hold the locks that the statement takes."""
    with database.connect(autocommit=False) as connection:
        connection.execute(statement, params)
        try:
            yield
        finally:
            connection.rollback()


def wait_for_waiting(database: Database, role: str) -> None:
    """Wait until the publisher's connection of this role waits for a lock."""
    waiting = (
        f"SELECT count(*) {OURS} AND starts_with(application_name, 'pg_eventstream ' || %s)"
        " AND wait_event_type = 'Lock'"
    )
    wait_until(lambda: database.value(waiting, [role]) > 0, timeout=30, check=0.05)


@contextmanager
def terminating_backends(database: Database, chance: random.Random) -> Iterator[list[str]]:
    """Keep ending random sessions of the database, of senders and of the publisher.

    Yields the list of the names of ended sessions.
    """
    stopping = threading.Event()
    ended: list[str] = []

    def terminate() -> None:
        while not stopping.wait(chance.uniform(0.02, 0.3)):
            ended.extend(
                name
                for (name,) in database.fetch(
                    """
                    SELECT application_name FROM (
                        SELECT pid, application_name FROM pg_stat_activity
                         WHERE datname = current_database() AND pid <> pg_backend_pid()
                           AND backend_type = 'client backend'
                         ORDER BY random() LIMIT 1
                    ) AS session WHERE pg_terminate_backend(pid)
                    """
                )
            )

    thread = threading.Thread(target=terminate)
    thread.start()
    try:
        yield ended
    finally:
        stopping.set()
        thread.join()


@dataclass
class _Hold:
    after: bool
    held: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        self.held.set()
        self.go_on.wait(60)


class Relay(HttpService):
    """A relay to a control port that can hold requests before or after forwarding them."""

    def __init__(self, control_port: int) -> None:
        super().__init__()
        self._control_port = control_port
        self._next: list[_Hold] = []

    def hold(self, *, after: bool) -> Callable[[], None]:
        """Hold the next request only. Returns when it is held, with a function that releases it."""
        hold = _Hold(after)
        self._next.append(hold)
        assert hold.held.wait(30)
        return hold.go_on.set

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = body_of(request)
        hold = self._next.pop() if self._next else None
        if hold is not None and not hold.after:
            hold.wait()
        connection = http.client.HTTPConnection("127.0.0.1", self._control_port, timeout=30)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", request.path, body, headers)
        with connection.getresponse() as response:
            text = response.read()
        if hold is not None and hold.after:
            hold.wait()
        with suppress(OSError):  # the client was killed in the meantime
            respond(request, response.status, text)


@dataclass
class Stage:
    """Brings publishers to a certain point of their work, under load."""

    database: Database
    load: Load
    relay: Relay
    new_publisher: NewPublisher
    chance: random.Random

    def start(self) -> PublisherProcess:
        publisher = self.new_publisher(
            PG_EVENTSTREAM_TEST_GRIP_URL=f"{self.relay.url}?key={KEY}",
            PG_EVENTSTREAM_TEST_SETTINGS='{"EVENTSTREAM_RETENTION": 5}',
        )
        publisher.start()
        return publisher

    def lead(self) -> PublisherProcess:
        publisher = self.start()
        publisher.wait_for_log(": leading", timeout=60)
        return publisher

    def more(self, count: int = 20) -> None:
        """Wait until ``count`` more events are committed."""
        least = len(self.load.committed) + count
        wait_until(lambda: len(self.load.committed) >= least, timeout=30)

    def last(self) -> int:
        """The last position that was assigned."""
        return int(self.database.value("SELECT max(position) FROM pg_eventstream_cursor") or 0)


# The points. Each yields a publisher that is held there, and releases it afterwards.


@contextmanager
def before_it_sequences(stage: Stage) -> Iterator[PublisherProcess]:
    publisher = stage.lead()
    with locked(stage.database, SEQUENCING):
        stage.more()
        wait_for_waiting(stage.database, "leader")
        yield publisher


@contextmanager
def while_it_sequences(stage: Stage) -> Iterator[PublisherProcess]:
    """It has written some of the rows and is about to write more."""
    publisher = stage.lead()
    begun = "SELECT count(*) FROM pg_eventstream_cursor WHERE place <> ''"
    wait_until(lambda: stage.database.value(begun) == 1, timeout=30)
    with stage.database.connect(autocommit=False) as connection:
        with locked(stage.database, SEQUENCING):
            connection.execute(
                "INSERT INTO pg_eventstream_stream (position, channel, eid, event_id)"
                " SELECT max(position) + 3, '-', 1, 0 FROM pg_eventstream_cursor"
            )
            stage.more()
        wait_for_waiting(stage.database, "leader")
        yield publisher
        connection.rollback()


@contextmanager
def between_sequence_and_publish(stage: Stage) -> Iterator[PublisherProcess]:
    publisher = stage.lead()
    let_go = stage.relay.hold(after=False)
    last = stage.last()
    stage.more()
    wait_until(lambda: stage.last() > last, timeout=30)
    with locked(stage.database, "LOCK TABLE pg_eventstream_event IN ACCESS EXCLUSIVE MODE"):
        let_go()
        wait_for_waiting(stage.database, "feed")
        yield publisher


@contextmanager
def before_the_proxy_took_the_batch(stage: Stage) -> Iterator[PublisherProcess]:
    """The proxy takes it later, perhaps after the next publisher has published it."""
    publisher = stage.lead()
    stage.more()
    let_go = stage.relay.hold(after=False)
    yield publisher
    threading.Timer(stage.chance.uniform(0, 2), let_go).start()


@contextmanager
def before_the_proxy_has_answered(stage: Stage) -> Iterator[PublisherProcess]:
    publisher = stage.lead()
    stage.more()
    let_go = stage.relay.hold(after=True)
    yield publisher
    let_go()


@contextmanager
def between_publish_and_acknowledgement(stage: Stage) -> Iterator[PublisherProcess]:
    publisher = stage.lead()
    with locked(stage.database, "SELECT FROM pg_eventstream_proxy FOR UPDATE"):
        stage.more()
        wait_for_waiting(stage.database, "feed")
        yield publisher


@contextmanager
def while_it_sweeps(stage: Stage) -> Iterator[PublisherProcess]:
    """It has deleted some rows of a batch and is about to delete more."""
    due = (
        "FROM pg_eventstream_event AS e JOIN pg_eventstream_stream AS s ON s.event_id = e.id"
        " WHERE s.sequenced_at < now() - interval '6 seconds'"
        "   AND s.position <= (SELECT max(position) FROM pg_eventstream_proxy)"
    )
    last = f"SELECT e.id {due} ORDER BY s.position OFFSET 5 LIMIT 1 FOR KEY SHARE OF e"
    pruning = f"SELECT count(*) {OURS} AND application_name = 'pg_eventstream prune'"
    with ExitStack() as stack:
        # Nobody prunes until the row is locked, so it cannot be gone before.
        with locked(stage.database, f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {PRUNE_LOCK})"):
            ordinary = stage.lead()
            wait_until(lambda: stage.database.value(f"SELECT count(*) {due}") > 10, timeout=60)
            stack.enter_context(locked(stage.database, last))
            ordinary.kill()
            wait_until(lambda: not stage.database.value(pruning), timeout=30)
        publisher = stage.lead()
        wait_for_waiting(stage.database, "prune")
        yield publisher


@contextmanager
def while_it_stands_by(stage: Stage) -> Iterator[PublisherProcess]:
    leader = stage.lead()
    standby = stage.start()
    standby.wait_for_log("standing by")
    yield standby
    leader.kill()


@contextmanager
def while_it_takes_over(stage: Stage) -> Iterator[PublisherProcess]:
    leader = stage.lead()
    standby = stage.start()
    standby.wait_for_log("standing by")
    with locked(stage.database, "SELECT FROM pg_eventstream_publisher FOR UPDATE"):
        leader.kill()
        wait_for_waiting(stage.database, "leader")
        yield standby


POINTS = [
    before_it_sequences,
    while_it_sequences,
    between_sequence_and_publish,
    before_the_proxy_took_the_batch,
    before_the_proxy_has_answered,
    between_publish_and_acknowledgement,
    while_it_sweeps,
    while_it_stands_by,
    while_it_takes_over,
]
