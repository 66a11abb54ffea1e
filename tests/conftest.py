"""Fixtures: real servers, each started for the first test that needs it, once per run.

Each test gets a separate database, a copy of a migrated template, so that no lock, notification or
row of one test reaches another.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.test import override_settings

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import Process, free_port
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.application import Serve, application
from tests.support.control_port import ControlPort
from tests.support.database import ADDRESS, Database, new_database, running_postgres
from tests.support.environment import DIRECTORY, KEY, THOROUGH, child_environment, directory
from tests.support.folders import misplaced
from tests.support.programs import installed
from tests.support.publisher import NewPublisher, PublisherProcess
from tests.support.sse_client import OpenStream, SSEClient

if TYPE_CHECKING:
    from tests.support.browser import Browser, Page
    from tests.support.consumers import Handled


_TESTS = Path(__file__).parent
_FIRST = [
    *("docs", "soak", "model", "acceptance", "faults", "integration", "fuzz", "endpoint", "unit")
]


def pytest_configure() -> None:
    DIRECTORY.chmod(0o755)
    os.environ["PG_EVENTSTREAM_TEST_DSN"] = ADDRESS
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.project.settings"
    import django

    django.setup()


def pytest_unconfigure() -> None:
    directory.cleanup()


@pytest.hookimpl(
    wrapper=True, tryfirst=True
)  # so that the time limit of the test does not run while it waits
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run several tests at once, but none together with a test marked ``alone``."""
    alone = item.get_closest_marker("alone") is not None
    with (item.config.rootpath / "pyproject.toml").open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        item.add_marker(folder)
        if wrong := misplaced(folder, getattr(item, "fixturenames", ())):
            raise pytest.UsageError(f"{item.nodeid}: {wrong}")
    # The folders with the longest files first, so that processes do not wait for one at the end.
    items.sort(key=lambda item: _FIRST.index(item.path.relative_to(_TESTS).parts[0]))
    if not THOROUGH:
        long = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def database(postgres: Postgres) -> Iterator[Database]:
    """A new, migrated database that Django and every child process of the test use."""
    with new_database(postgres) as made:
        yield made


@pytest.fixture(autouse=True)
def forget_consumers() -> Iterator[None]:
    """Forget the consumers that a test declares, and its conversions of old events."""
    from pg_eventstream.consumers import declare, event

    known, upcasts = dict(declare._declared), dict(event._upcasts)
    yield
    declare._declared.clear()
    declare._declared.update(known)
    event._upcasts.clear()
    event._upcasts.update(upcasts)


@pytest.fixture
def handled(database: Database) -> Handled:
    """What consumers have handled, with the handlers of `tests.support.handlers`."""
    from tests.support.consumers import Handled

    return Handled(database)


@pytest.fixture(scope="session")
def app_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def pushpin(app_port: int) -> Iterator[Pushpin]:
    """A proxy in front of `app_port`, which removes /stripped from the beginning of paths.

    It remembers ids of a channel for a minute, so every test uses separate channels.
    """
    app = f"127.0.0.1:{app_port}"
    with Pushpin(
        DIRECTORY / "pushpin",
        origin=f"{app}\n*,path_beg=/stripped/,replace_beg=/ {app}",
        sig_key=KEY,
        program=os.environ.get("PG_EVENTSTREAM_TEST_PUSHPIN", "pushpin"),
    ) as server:
        yield server


@pytest.fixture
def second_pushpin(app_port: int) -> Iterator[Pushpin]:
    """Another proxy in front of the same application, not started yet."""
    server = Pushpin(
        DIRECTORY / "second",
        origin=f"127.0.0.1:{app_port}",
        sig_key=KEY,
        program=os.environ.get("PG_EVENTSTREAM_TEST_PUSHPIN", "pushpin"),
    )
    yield server
    server.stop()


@pytest.fixture(scope="session")
def node_directory() -> Path:
    """A directory for Node.js programs, with its packages installed."""
    directory = DIRECTORY / "node"
    source = Path(__file__).parent / "support" / "node"
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("node_modules"))
    done = subprocess.run(
        [installed("npm"), "ci", "--prefer-offline", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def channel() -> str:
    return f"c{uuid.uuid4().hex[:8]}"


@pytest.fixture(params=["asgi"])
def app(
    request: pytest.FixtureRequest, database: Database, pushpin: Pushpin, app_port: int
) -> Iterator[Process]:
    """The application server behind the proxy; parametrize indirectly with "wsgi"."""
    process = application(app_port, pushpin, kind=request.param)
    yield process
    process.stop(timeout=5)


@pytest.fixture
def serve(database: Database) -> Iterator[Serve]:
    """Starts application servers without any proxy."""
    servers = Serve(database.name)
    yield servers
    servers.kill()


@pytest.fixture
def control() -> Iterator[ControlPort]:
    """A control port without a proxy, to which this process publishes."""
    with ControlPort() as port, override_settings(GRIP_URL=port.url):
        yield port


@pytest.fixture
def new_publisher(database: Database, pushpin: Pushpin) -> Iterator[NewPublisher]:
    """Makes publishers that publish to the proxy, and ends them with the test."""
    made: list[PublisherProcess] = []

    def make(*arguments: str, **environment: str) -> PublisherProcess:
        log_path = DIRECTORY / f"publisher-{database.name}-{len(made)}.log"
        process = PublisherProcess(log_path, child_environment(pushpin, **environment), *arguments)
        made.append(process)
        return process

    yield make
    for process in made:
        process.kill()


@pytest.fixture
def publisher(new_publisher: NewPublisher) -> PublisherProcess:
    """A publisher that leads."""
    return new_publisher().lead()


@pytest.fixture
def stream(app: Process, pushpin: Pushpin) -> Iterator[OpenStream]:
    """Opens streams through the proxy, and closes them with the test."""
    opened: list[SSEClient] = []

    def open_stream(*channels: str, **options: Any) -> SSEClient:
        client = SSEClient(f"{pushpin.url}/events/", list(channels), **options)
        opened.append(client.__enter__())
        return client

    yield open_stream
    for client in opened:
        client.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from tests.support.browser import Browser

    with Browser() as started:
        yield started


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    opened = browser.new_page()
    yield opened
    opened.close()
