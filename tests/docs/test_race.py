"""The race of `concepts/why-ids-skip` has the outcome that the page describes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.database import Database
from tests.support.documentation import ROOT, example, text_of

INSTALL, OWN_SERVER = example("docs/concepts/why-ids-skip.md", "pip install").code.splitlines()
ADDRESS = example("docs/concepts/why-ids-skip.md", "postgresql://").code.rstrip()


def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the page in the root of the repository."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    mine = {k: v for k, v in os.environ.items() if not k.startswith("DJANGO")}
    return subprocess.run(
        ["sh", "-ec", command],
        cwd=ROOT,
        env={**mine, "PATH": path, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", [OWN_SERVER, ADDRESS], ids=["own server", "address"])
def test_script_prints_the_table_of_the_page(command: str, database: Database) -> None:
    done = run(command.replace("postgresql://localhost/test", database.dsn))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"```text\n{done.stdout}```\n" in text_of("docs/concepts/why-ids-skip.md")


def test_script_leaves_nothing_in_the_database(database: Database) -> None:
    schemas = "SELECT nspname FROM pg_namespace ORDER BY nspname"
    before = database.fetch(schemas)
    assert run(ADDRESS.replace("postgresql://localhost/test", database.dsn)).returncode == 0
    assert database.fetch(schemas) == before


def test_script_needs_what_the_page_says_to_install() -> None:
    done = run(INSTALL, PIP_DRY_RUN="1")
    assert "Requirement already satisfied: pg-eventstream" in done.stdout
