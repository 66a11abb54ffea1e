"""Migrations run while senders, publisher and web processes of the old code continue to work.

The old processes run from an archive of the last commit before some migrations, made from the
repository's history: before the newest ones, and in a thorough run before older ones as well.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import Process, accepts, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.environment import DIRECTORY, THOROUGH, child_environment
from tests.support.publisher import PublisherProcess
from tests.support.sse_client import SSEClient

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
#: The last commits with exactly the migrations up to these.
COMMITS = {
    "0009": "c108e64fffea03b41cd8e56516ebccb20cf3a930",
    "0006": "95378dcb777ea179c188a82a0f0d25d5608f47dc",
    "0005": "03bc6b9766ff250d96e625479200a6b17fefa39b",
    "0001": "f1b391250490b4468b8c0344d206e99eb54945c9",
}
EVENTS = 5_000_000 if THOROUGH else 50_000
ATTEMPTS = 3
#: Of a sender before each event, in seconds.
PAUSE = 0.001 if THOROUGH else 0.005


class OldCode(NamedTuple):
    """The project at an earlier commit, in a separate directory."""

    directory: Path
    migrated: str


@pytest.fixture(scope="module", params=list(COMMITS)[: None if THOROUGH else 1])
def old_code(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OldCode:
    commit = COMMITS[request.param]
    if not (ROOT / ".git").exists() and "CI" not in os.environ:
        pytest.skip("needs the history of the repository, which a source archive does not have")
    directory = tmp_path_factory.mktemp("before")
    with subprocess.Popen(
        ["git", "archive", commit, "pg_eventstream", "tests", "pyproject.toml"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    ) as archive:
        subprocess.run(["tar", "-x", "-C", directory], stdin=archive.stdout, check=False)
    assert archive.returncode == 0, (
        f"commit {commit} is not in the history here: git fetch --unshallow"
    )
    return OldCode(directory, request.param)


class Upgrade:
    """A database with the tables of the old code; commands and processes of old and new code."""

    def __init__(self, database: Database, old_code: OldCode, pushpin: Pushpin) -> None:
        self.database = database
        self.old_code, self.migrated = old_code
        # They were elsewhere in older commits.
        in_project = (self.old_code / "tests/project/settings.py").exists()
        project = "tests.project" if in_project else "tests"
        self._old_settings, self.old_application = (
            f"{project}.settings",
            f"{project}.asgi:application",
        )
        self._pushpin = pushpin
        self.run("migrate", "--run-syncdb", old=True)
        assert self.newest == self.migrated

    @property
    def newest(self) -> str:
        """The newest migration that is applied."""
        name: str = self.database.value(
            "SELECT max(name) FROM django_migrations WHERE app = 'pg_eventstream'"
        )
        return name[:4]

    def environment(self, *, old: bool) -> dict[str, str]:
        return child_environment(
            self._pushpin,
            PG_EVENTSTREAM_TEST_DSN=self.database.dsn,
            PYTHONPATH=str(self.old_code if old else ROOT),
            DJANGO_SETTINGS_MODULE=self._old_settings if old else "tests.project.settings",
            PGAPPNAME="old" if old else "new",
        )

    @contextmanager
    def directory(self, *, old: bool) -> Iterator[None]:
        """The directory in which to start processes: Python finds modules there first."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.old_code if old else ROOT)
            yield

    def run(self, *command: str, old: bool = False) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "django", *command, "--verbosity=0"],
            cwd=self.old_code if old else ROOT,
            env=self.environment(old=old),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def process(self, name: str, *arguments: str, old: bool) -> Process:
        log_path = DIRECTORY / f"{name}-{self.database.name}.log"
        return Process(
            name,
            [sys.executable, *arguments],
            log_path=log_path,
            environment=self.environment(old=old),
        )

    def publisher(self, *, old: bool) -> PublisherProcess:
        log_path = DIRECTORY / f"publisher-{self.database.name}-{old}.log"
        return PublisherProcess(log_path, self.environment(old=old))


@pytest.fixture
def upgrade(postgres: Postgres, old_code: OldCode, pushpin: Pushpin) -> Iterator[Upgrade]:
    name = f"upgrade_{os.urandom(4).hex()}"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        yield Upgrade(Database(postgres, name), old_code, pushpin)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


class SqlSender(threading.Thread):
    """Sends until it is stopped, and waits no more than 100 ms for a lock.

    Waiting longer would be an error of its statement.
    """

    def __init__(self, database: Database, channel: str, name: str) -> None:
        super().__init__(daemon=True, name=name)
        self._database = database
        self._channel = channel
        self._stopping = threading.Event()
        self.sent = 0
        self.held_up = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with self._database.connect() as connection:
                connection.execute("SET lock_timeout = '100ms'")
                while not self._stopping.wait(PAUSE):
                    try:
                        connection.execute(
                            "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s)",
                            [self._channel, f"{self.name} {self.sent}"],
                        )
                        self.sent += 1
                    except psycopg.errors.LockNotAvailable:
                        self.held_up += 1
        except Exception as e:  # noqa: BLE001
            self.error = e

    def wait_for_more(self, count: int = 100) -> None:
        sent = self.sent
        wait_until(lambda: self.sent >= sent + count or not self.is_alive(), timeout=60)
        assert self.error is None

    def stop(self) -> None:
        self._stopping.set()
        self.join(30)
        assert self.error is None


@contextmanager
def sending(database: Database, *channels: str) -> Iterator[list[SqlSender]]:
    senders = [SqlSender(database, channel, f"sql{n}") for n, channel in enumerate(channels)]
    for sender in senders:
        sender.start()
    try:
        for sender in senders:
            sender.wait_for_more(20)
        yield senders
    finally:
        for sender in senders:
            sender.stop()


_DJANGO_SENDER = """
import sys, threading, django
django.setup()
from pg_eventstream import send_event
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
sent = 0
while not over.wait(0.005):
    send_event(sys.argv[1], "message", f"django {sent}", json_encode=False)
    sent += 1
print(sent)
"""


@contextmanager
def sending_by_old_django(upgrade: Upgrade, channel: str) -> Iterator[list[int]]:
    """The list contains the number of sent events at the end."""
    sent: list[int] = []
    with subprocess.Popen(
        [sys.executable, "-c", _DJANGO_SENDER, channel],
        cwd=upgrade.old_code,
        env=upgrade.environment(old=True),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield sent
            output, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            assert errors == ""
            sent.append(int(output))
        finally:
            process.kill()


def test_processes_of_the_old_code_continue_through_the_migrations(
    upgrade: Upgrade, pushpin: Pushpin, app_port: int, channel: str
) -> None:
    database = upgrade.database
    server = upgrade.process(
        *("the old application server", "-m", "uvicorn", upgrade.old_application),
        *(f"--port={app_port}", "--log-level=warning"),
        old=True,
    )
    old_publisher, new_publisher = upgrade.publisher(old=True), upgrade.publisher(old=False)
    with ExitStack() as stack:
        for started in (server, old_publisher, new_publisher):
            stack.callback(started.kill)
        with upgrade.directory(old=True):
            server.start(ready=lambda: accepts(app_port))
            old_publisher.lead()
        streams = [
            stack.enter_context(SSEClient(f"{address}/events/", [channel])).wait_open()
            for address in (pushpin.url, f"http://127.0.0.1:{app_port}")
        ]

        def all_have_come(senders: list[SqlSender], django: list[int]) -> None:
            expected = {sender.name: sender.sent for sender in senders}
            expected["django"] = django[0]
            for stream in streams:
                stream.wait_count(sum(expected.values()), timeout=60)
            for stream in streams:
                came: dict[str, list[int]] = {name: [] for name in expected}
                for event in stream.events:
                    name, number = event.data.split()
                    came[name].append(int(number))
                assert came == {name: list(range(count)) for name, count in expected.items()}
                ids = [event.eids[channel] for event in stream.events]
                assert ids == list(range(1, len(ids) + 1))
                assert [e.type for e in stream.control if e.type != "keep-alive"] == ["stream-open"]

        with (
            sending_by_old_django(upgrade, channel) as django,
            sending(database, channel, channel) as senders,
        ):
            for stream in streams:
                stream.wait_count(50)
            upgrade.run("migrate")
            assert upgrade.newest > upgrade.migrated
            for sender in senders:
                sender.wait_for_more()
            with upgrade.directory(old=False):
                new_publisher.start()
            new_publisher.wait_for_log("standing by")
            old_publisher.stop()
            new_publisher.wait_for_log(": leading")
            for sender in senders:
                sender.wait_for_more()
        all_have_come(senders, django)
        new_publisher.stop()
        server.stop()

    assert server.log_path is not None
    assert server.log_path.read_text() == ""
    for process, expected in (
        (old_publisher, ["database", "leading", "stopping", "stopped"]),
        (new_publisher, ["database", "standing", "leading", "stopping", "stopped"]),
    ):
        said = re.findall(r"^.*INFO publisher \S+: (\w+).*\n|^(.+)\n", process.log, re.MULTILINE)
        assert [word or line for word, line in said] == expected, process.log


def test_new_application_server_streams_while_the_old_publisher_leads(
    upgrade: Upgrade, pushpin: Pushpin, app_port: int, channel: str
) -> None:
    """As when the processes are restarted in the other order."""
    server = upgrade.process(
        *("the new application server", "-m", "uvicorn", "tests.project.asgi:application"),
        *(f"--port={app_port}", "--log-level=warning"),
        old=False,
    )
    old_publisher = upgrade.publisher(old=True)
    with ExitStack() as stack:
        for started in (server, old_publisher):
            stack.callback(started.kill)
        with upgrade.directory(old=True):
            old_publisher.lead()
        upgrade.run("migrate")
        assert upgrade.newest > upgrade.migrated
        with upgrade.directory(old=False):
            server.start(ready=lambda: accepts(app_port))
        streams = [
            stack.enter_context(SSEClient(f"{address}/events/", [channel])).wait_open()
            for address in (pushpin.url, f"http://127.0.0.1:{app_port}")
        ]
        with sending(upgrade.database, channel) as senders:
            senders[0].wait_for_more()
        expected = [f"sql0 {number}" for number in range(senders[0].sent)]
        for stream in streams:
            stream.wait_count(len(expected), timeout=60)
            assert [event.data for event in stream.events] == expected
            assert [event.eids[channel] for event in stream.events] == list(
                range(1, len(expected) + 1)
            )
        old_publisher.stop()
        server.stop()

    assert server.log_path is not None
    assert server.log_path.read_text() == ""


def held_up(database: Database, work: Callable[[], object]) -> int:
    """How many times a sender waited 100 ms for a lock while this was done."""
    with sending(database, "a", "b") as senders:
        work()
    return sum(sender.held_up for sender in senders)


def fill(database: Database, events: int) -> None:
    with database.connect() as connection:
        connection.execute("SET session_replication_role = replica; SET synchronous_commit = off")
        connection.execute(
            "INSERT INTO pg_eventstream_event (channel, data)"
            " SELECT 'c' || n %% 1000, 'data' FROM generate_series(1, %s) AS n",
            [events],
        )
        connection.execute(
            "INSERT INTO pg_eventstream_stream (position, channel, eid, event_id)"
            " SELECT id, channel, id / 1000 + 1, id FROM pg_eventstream_event"
        )
        connection.execute(
            "INSERT INTO pg_eventstream_cursor (position, snapshot, cluster)"
            " SELECT %s, pg_current_snapshot(), system_identifier FROM pg_control_system()",
            [events],
        )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("beside", ["short transactions", "a long transaction", "a long read"])
def test_no_sender_waits_100_ms_for_a_migration(upgrade: Upgrade, beside: str) -> None:
    """One of three attempts must succeed: a loaded machine can pause a migration anywhere."""
    database = upgrade.database
    fill(database, EVENTS if beside == "short transactions" else 1000)

    def migrate() -> None:
        upgrade.run("migrate", "pg_eventstream")

    def migrate_beside_it() -> None:
        with database.connect(autocommit=False) as other:
            if beside == "a long transaction":
                other.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', '')")
            else:
                other.execute("SELECT count(*) FROM pg_eventstream_event")
            thread = threading.Thread(target=migrate)
            thread.start()
            # It has tried for a while.
            wait_until(
                lambda: (
                    database.value(
                        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'new'"
                        " AND datname = current_database()"
                        " AND xact_start < clock_timestamp() - interval '1 s'"
                    )
                    > 0
                    or not thread.is_alive()
                ),
                timeout=60,
            )
        thread.join(60)
        assert not thread.is_alive()

    work = migrate if beside == "short transactions" else migrate_beside_it
    for _ in range(ATTEMPTS):
        times = held_up(database, work)
        assert upgrade.newest > upgrade.migrated
        if not times:
            break
        upgrade.run("migrate", "pg_eventstream", upgrade.migrated)
    else:
        pytest.fail(f"senders were held up, {times} times in the last attempt")


def test_migration_that_holds_senders_up_is_noticed(database: Database) -> None:
    def migrate() -> None:
        database.execute(
            "BEGIN; LOCK TABLE pg_eventstream_event IN SHARE ROW EXCLUSIVE MODE;"
            " SELECT pg_sleep(1); COMMIT"
        )

    assert held_up(database, migrate) > 0
