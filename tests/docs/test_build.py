"""The documentation is built without warnings; broken references are warnings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.documentation import DOCS


def build(source: Path, to: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-nW", "--keep-going", "-q", "-c", DOCS, source, to],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_documentation_is_built_without_a_warning(tmp_path: Path) -> None:
    done = build(DOCS, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pg_eventstream.send_event" in (tmp_path / "reference/python.html").read_text()


def test_reference_that_leads_nowhere_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "index.md").write_text(
        "# Title\n\n[](away.md) and {py:func}`pg_eventstream.away`\n"
    )
    done = build(tmp_path, tmp_path / "built")
    assert done.returncode != 0
    assert "away.md" in done.stderr
    assert "pg_eventstream.away" in done.stderr
