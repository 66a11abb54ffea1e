"""Real servers: PostgreSQL and Pushpin once per run, a database per test.

Django is set up against the run's PostgreSQL before any test module is imported. Each test
gets a database of its own, a copy of a migrated template, so that no lock, notification or
row of one test reaches another.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import Process, accepts, free_port
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.browser import browser, page
from tests.support.database import Database
from tests.support.environment import DIRECTORY, KEY, THOROUGH, child_environment, directory
from tests.support.publisher import PublisherProcess
from tests.support.sse_client import SSEClient

__all__ = ["browser", "page"]  # fixtures

_TEMPLATE = "template_migrated"

# The programs of another version, for instance /usr/lib/postgresql/15/bin.
_bin_dir = os.environ.get("PG_EVENTSTREAM_TEST_POSTGRES")
_postgres = Postgres(
    DIRECTORY / "postgres",
    bin_dir=Path(_bin_dir) if _bin_dir else None,
    settings={"max_connections": "300", "max_prepared_transactions": "10", "log_statement": "none"},
)


def _only_hands_out_tests(config: pytest.Config) -> bool:
    """Whether this process runs none itself (pytest-xdist). Those that do have own servers."""
    return bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if _only_hands_out_tests(config):
        return
    DIRECTORY.chmod(0o755)
    _postgres.start()
    with psycopg.connect(_postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {_TEMPLATE}")
    os.environ["PG_EVENTSTREAM_TEST_DSN"] = _postgres.dsn(_TEMPLATE)
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.project.settings"

    import django
    from django.core.management import call_command
    from django.db import connections

    django.setup()
    call_command("migrate", run_syncdb=True, verbosity=0)
    connections.close_all()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not _only_hands_out_tests(config):
        _postgres.stop("immediate")
    directory.cleanup()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # so that nobody's time limit runs meanwhile
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Several tests run at once; with one that is marked ``alone`` none does."""
    alone = item.get_closest_marker("alone") is not None
    with (item.config.rootpath / "pyproject.toml").open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(item.path.relative_to(Path(__file__).parent).parts[0])
    if not THOROUGH:
        long = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session")
def postgres() -> Postgres:
    return _postgres


@pytest.fixture
def database(postgres: Postgres) -> Iterator[Database]:
    """A fresh, migrated database, which Django and every child process of the test use."""
    from django.db import connections

    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
    connections.close_all()
    connections.settings["default"]["NAME"] = name
    connections["default"].settings_dict["NAME"] = name
    previous = os.environ["PG_EVENTSTREAM_TEST_DSN"]
    os.environ["PG_EVENTSTREAM_TEST_DSN"] = postgres.dsn(name)
    try:
        yield Database(postgres, name)
    finally:
        os.environ["PG_EVENTSTREAM_TEST_DSN"] = previous
        connections.close_all()
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def app_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def pushpin(app_port: int) -> Iterator[Pushpin]:
    """A proxy in front of `app_port`, which takes /stripped off the paths that begin with it.

    It remembers ids of a channel for a minute, so every test uses channels of its own.
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
    if shutil.which("npm") is None and "CI" not in os.environ:
        pytest.skip("needs Node.js and npm")
    directory = DIRECTORY / "node"
    source = Path(__file__).parent / "support" / "node"
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("node_modules"))
    installed = subprocess.run(
        ["npm", "ci", "--prefer-offline", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert installed.returncode == 0, installed.stderr
    return directory


@pytest.fixture
def channel() -> str:
    return f"c{uuid.uuid4().hex[:8]}"


@pytest.fixture(params=["asgi"])
def app(
    request: pytest.FixtureRequest, database: Database, pushpin: Pushpin, app_port: int
) -> Iterator[Process]:
    """The application server behind the proxy; parametrize indirectly with "wsgi"."""
    arguments = {
        "asgi": [
            "uvicorn",
            "tests.project.asgi:application",
            f"--port={app_port}",
            "--log-level=warning",
        ],
        "wsgi": ["gunicorn", "tests.project.wsgi", f"--bind=127.0.0.1:{app_port}", "--threads=8"],
    }[request.param]
    process = Process(
        f"the application server ({request.param})",
        [sys.executable, "-m", *arguments],
        log_path=DIRECTORY / "app.log",
        environment=child_environment(pushpin),
    )
    process.start(ready=lambda: accepts(app_port))
    yield process
    process.stop(timeout=5)


@pytest.fixture
def new_publisher(
    database: Database, pushpin: Pushpin
) -> Iterator[Callable[..., PublisherProcess]]:
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
def publisher(new_publisher: Callable[..., PublisherProcess]) -> PublisherProcess:
    """A publisher that leads."""
    return new_publisher().lead()


@pytest.fixture
def stream(app: Process, pushpin: Pushpin) -> Iterator[Callable[..., SSEClient]]:
    """Opens streams through the proxy, and closes them with the test."""
    opened: list[SSEClient] = []

    def open_stream(*channels: str, **options: Any) -> SSEClient:
        client = SSEClient(f"{pushpin.url}/events/", list(channels), **options)
        opened.append(client.__enter__())
        return client

    yield open_stream
    for client in opened:
        client.close()
