"""The project of a reader who follows the quickstart, for the examples of all pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pg_eventstream.servers.processes import accepts
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.documentation import example
from tests.support.projects import Project
from tests.support.reader import (
    ASGI,
    BEFORE,
    MODELS,
    MORE_URLS,
    add,
    migrate,
    put_behind_pushpin,
)


@pytest.fixture
def project(database: Database, pushpin: Pushpin, tmp_path: Path) -> Iterator[Project]:
    """A project that follows the quickstart, with the page at its root, before it migrates."""
    with Project(tmp_path, "myproject.settings", database, pushpin) as made:
        made.environment["PROJECT"] = str(tmp_path)
        made.write("myproject/__init__.py", "")
        made.write("myproject/asgi.py", ASGI)
        made.write("myproject/settings.py", BEFORE)
        add(made, example("docs/quickstart.md", '"daphne", *INSTALLED_APPS'))
        add(made, example("docs/quickstart.md", '"rooms/<room>/events/"'))
        made.write("myproject/urls.py", MORE_URLS)
        made.write("page.html", example("docs/quickstart.md", "get_current_event_id").code)
        made.write("shop/__init__.py", "")
        made.write("shop/models.py", MODELS)
        yield made


@pytest.fixture
def serve(project: Project, app_port: int) -> Callable[[], str]:
    """Migrates the project and serves it with its `runserver`. Returns the address."""

    def start() -> str:
        migrate(project)
        address = f"127.0.0.1:{app_port}"
        project.start("runserver", address, "--noreload", ready=lambda: accepts(app_port))
        return f"http://{address}"

    return start


@pytest.fixture
def serve_behind_pushpin(project: Project, pushpin: Pushpin, app_port: int) -> Callable[[], str]:
    """Migrates the project and serves it behind Pushpin, with a publisher. Returns the address."""

    def start() -> str:
        put_behind_pushpin(project)
        migrate(project)
        project.serve(app_port)
        return pushpin.url

    return start
