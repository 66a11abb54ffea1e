"""The tutorial runs step by step, from an empty directory to its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pg_eventstream.servers.processes import Process, accepts, free_port
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.browser import Page
from tests.support.database import Database
from tests.support.documentation import example
from tests.support.projects import Project
from tests.support.reader import add
from tests.support.roles import psql

FILES = [
    example("docs/tutorial.md", "ASGI_APPLICATION"),
    example("docs/tutorial.md", "class Note"),
    example("docs/tutorial.md", "def index"),
    example("docs/tutorial.md", "<!doctype html>"),
]
URLS = example("docs/tutorial.md", "urlpatterns")
INSTALL = example("docs/tutorial.md", "pip install")
BEGIN = example("docs/tutorial.md", "startproject")
TABLES = example("docs/tutorial.md", "makemigrations")
SERVE = example("docs/tutorial.md", "runserver\n")
SQL = example("docs/tutorial.md", "BEGIN;")


@pytest.fixture
def notes(database: Database, pushpin: Pushpin, tmp_path: Path) -> Iterator[Project]:
    """An empty directory, and a server without a database `notes`."""
    with Project(tmp_path, "myproject.settings", database, pushpin) as made:
        # libpq finds it, as it finds a reader's.
        del made.environment["DJANGO_SETTINGS_MODULE"], made.environment["PGDATABASE"]
        made.environment["PYTHONWARNINGS"] = "error::DeprecationWarning:pg_eventstream"
        programs = str(database.postgres.bin_dir)
        made.environment["PATH"] = os.pathsep.join([made.environment["PATH"], programs])
        try:
            yield made
        finally:
            made.__exit__(None, None, None)
            database.execute("DROP DATABASE IF EXISTS notes WITH (FORCE)")


def serve(project: Project, port: int) -> Process:
    assert SERVE.code == "python manage.py runserver\n"
    process = Process(
        "runserver",
        [sys.executable, "manage.py", "runserver", f"127.0.0.1:{port}", "--noreload"],
        log_path=project.directory / "runserver.log",
        environment=project.environment,
        directory=project.directory,
    )
    process.start(ready=lambda: accepts(port))
    return process


@pytest.mark.faults
@pytest.mark.thorough
def test_every_step_works(notes: Project, database: Database, page: Page) -> None:
    venv, activate, install = INSTALL.code.splitlines()
    assert (venv, activate) == ("python3 -m venv .venv", ". .venv/bin/activate")
    notes.environment["PIP_DRY_RUN"] = "1"
    assert "Requirement already satisfied: pg-eventstream" in notes.run("sh", "-ec", install)

    notes.run("sh", "-ec", BEGIN.code)
    for one in FILES:
        add(notes, one)
    (notes.directory / "myproject/urls.py").unlink()
    add(notes, URLS)
    assert "no issues" in notes.run("sh", "-ec", TABLES.code)

    theirs, port = Database(database.postgres, "notes"), free_port()
    server = serve(notes, port)
    try:
        page.goto(f"http://127.0.0.1:{port}/")
        page.evaluate(
            "document.querySelector('input[name=text]').value = '<b>from the form</b>';"
            "document.querySelector('button').click()"
        )
        shown = "[...document.querySelectorAll('li')].map((item) => item.textContent).join()"
        page.wait_for(f"{shown} === '<b>from the form</b>'")
        assert psql(theirs, script=SQL.code).returncode == 0
        page.wait_for(f"{shown} === '<b>from the form</b>,from SQL'")
        undone = SQL.code.replace("from SQL", "never").replace("COMMIT;", "ROLLBACK;")
        assert psql(theirs, script=undone).returncode == 0
        server.stop()
        for n in range(2):
            assert psql(theirs, script=SQL.code.replace("from SQL", f"note {n}")).returncode == 0
        server = serve(notes, port)
        page.wait_for(f"{shown} === '<b>from the form</b>,from SQL,note 0,note 1'")
    finally:
        server.kill()
    ids = "new Set([...document.querySelectorAll('li')].map((item) => item.id)).size === 4"
    page.wait_for(ids)
