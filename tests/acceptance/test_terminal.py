"""The commands for people, in a real terminal."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.database import Database
from tests.support.environment import child_environment
from tests.support.terminal import Terminal


def test_send_shows_progress_in_a_terminal(database: Database, tmp_path: Path) -> None:
    lines = tmp_path / "events.jsonl"
    event = json.dumps({"channel": "a", "data": 1})
    lines.write_text(f"{event}\n" * 3000)
    with Terminal(
        "eventstream_send", "-", environment=child_environment(), stdin=str(lines)
    ) as terminal:
        assert terminal.wait() == 0
        assert "\r[#" in terminal.output
        assert terminal.lines[-1].endswith("3000 events sent.")
        assert max(len(part) for part in terminal.output.split("\r")) < 80
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 3000
