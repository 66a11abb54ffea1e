"""The commands for people, in a real terminal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pg_eventstream.servers.pushpin import Pushpin
from tests.support.consumers import declared
from tests.support.database import Database
from tests.support.environment import child_environment
from tests.support.publisher import PublisherProcess
from tests.support.rounds import sequence
from tests.support.stored_consumer import CONSUMER
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


def test_tail_shows_lines_that_fit_into_the_terminal(
    database: Database, publisher: PublisherProcess, pushpin: Pushpin
) -> None:
    database.send("room", '"first"')
    environment = child_environment(pushpin)
    with Terminal("eventstream_tail", "room", "--since", "1h", environment=environment) as terminal:
        terminal.wait_for("first")
        database.execute(
            "INSERT INTO pg_eventstream_event (channel, type, data) VALUES"
            " ('room', 'long', %s), ('other', 'message', 'hidden')",
            ["\x1b[2J語" * 100],
        )
        terminal.wait_for("room:2")
        terminal.interrupt()
        assert terminal.wait() == 0
        first, second = (line for line in terminal.lines if " room:" in line)
    assert re.search(r"\d  room:1  message  \+[\d.]+m?s  .*\"first\"$", first)
    assert re.search(r" \+\d+ms  <=\d+ms ", second)
    assert second.endswith("...")
    assert "\\x1b[2J語" in second
    assert len(second) + second.count("語") <= 80
    assert "hidden" not in terminal.output
    assert "Traceback" not in terminal.output


def test_tail_ends_when_its_reader_does(database: Database) -> None:
    for n in range(3):
        database.send("room", str(n))
    sequence(database)
    tail = f"{sys.executable} -m django eventstream_tail --all --since earliest --json"
    found = subprocess.run(
        ["sh", "-c", f"({tail}; echo status $? >&2) | head -n 1"],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(found.stdout)["data"] == "0"
    assert found.stderr.endswith("status 0\n")
    assert "Broken pipe" not in found.stderr


def test_status_on_a_terminal_fits_is_coloured_redraws_and_ends_on_ctrl_c(
    database: Database,
) -> None:
    environment = {**child_environment(), "PG_EVENTSTREAM_TEST_GRIP_URL": "http://127.0.0.1:1"}
    with Terminal("eventstream_status", "--watch", "0.2", environment=environment) as terminal:
        terminal.wait_for("no-publisher")
        assert max(map(len, terminal.lines)) <= 80
        assert "\x1b[31;1mBROKEN" in terminal.output  # red and bold
        terminal.wait_for("waiting to be put in order: none")
        database.send("c")
        terminal.wait_for("waiting to be put in order: 1")
        # Each time, the screen is drawn again from its upper left corner.
        assert terminal.output.count("\x1b[H") >= 2
        terminal.interrupt()
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.output


SLOW = [pytest.mark.faults, pytest.mark.thorough]
REMOVED, KEPT = "The consumer 'stock' is removed.", "Nothing was removed."
REMOVE = ["eventstream_consumers", "remove", "stock"]


def consumers(database: Database) -> int:
    return int(database.value("SELECT count(*) FROM pg_eventstream_consumer"))


@pytest.mark.parametrize(
    ("keys", "message", "status"),
    [
        ("y\n", REMOVED, 0),
        pytest.param("\n", KEPT, 1, marks=SLOW),
        pytest.param("yesterday\n", KEPT, 1, marks=SLOW),
        ("\x04", KEPT, 1),
        ("", KEPT, 1),  # Ctrl-C
    ],
)
def test_remove_asks_in_a_terminal(
    database: Database, keys: str, message: str, status: int
) -> None:
    """The code still declares the consumer."""
    database.execute(CONSUMER)
    environment = child_environment(None, **declared({"name": "stock", "handler": "record"}))
    with Terminal(*REMOVE, environment=environment) as terminal:
        terminal.wait_for("Remove it? [y/N] ")
        assert "seems to be needed: the code still declares it" in terminal.output
        assert consumers(database) == 1
        terminal.type(keys) if keys else terminal.interrupt()
        assert terminal.wait() == status
        assert terminal.lines[-1].endswith(message)
        assert "Traceback" not in terminal.output
    assert consumers(database) == (status != 0)


@pytest.mark.parametrize("stdin", ["yes", pytest.param("closed", marks=SLOW)])
def test_remove_does_not_ask_without_a_terminal(database: Database, stdin: str) -> None:
    database.execute(CONSUMER)
    environment = child_environment(None, **declared({"name": "stock", "handler": "record"}))
    redirect = {"yes": "<<< y", "closed": "<&-"}[stdin]
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m django {' '.join(REMOVE)} {redirect}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "To remove it in spite of that, use --yes." in done.stderr
    assert "Traceback" not in done.stderr
    assert "[y/N]" not in done.stdout
    assert consumers(database) == 1


@pytest.mark.faults
@pytest.mark.thorough
@pytest.mark.parametrize("command", [["reset", "stock", "--to", "latest"], ["skip", "stock", "1"]])
def test_what_can_be_corrected_is_not_asked_for(database: Database, command: list[str]) -> None:
    """A reset can be repeated, and the event to skip is named in the command."""
    database.execute(CONSUMER)
    environment = child_environment(None, **declared({"name": "stock", "handler": "record"}))
    with Terminal("eventstream_consumers", *command, environment=environment) as terminal:
        assert terminal.wait() == 0
        assert "?" not in terminal.output
