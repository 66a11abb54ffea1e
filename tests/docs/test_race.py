"""The race of `concepts/why-ids-skip` ends as the page says, wherever it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.database import Database

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "concepts" / "why-ids-skip.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("given", ["a server of its own", "an address"])
def test_script_prints_the_table_of_the_page(given: str, database: Database) -> None:
    arguments = [database.dsn] if given == "an address" else []
    run = subprocess.run(
        [sys.executable, DOCS / "examples" / "race.py", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert f"```text\n{run.stdout}```\n" in PAGE


def test_script_leaves_nothing_behind(database: Database) -> None:
    schemas = "SELECT nspname FROM pg_namespace ORDER BY nspname"
    before = database.fetch(schemas)
    test_script_prints_the_table_of_the_page("an address", database)
    assert database.fetch(schemas) == before
