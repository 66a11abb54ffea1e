"""The demo, as a user starts it, with and without a proxy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import Process, ServerError, wait_until
from tests.support.browser import Page
from tests.support.environment import DIRECTORY

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, "-m", "pg_eventstream.demo"]
# Each mode with the words that describe it.
MODES = {"direct": ([], "without a proxy"), "pushpin": (["--proxy=pushpin"], "through Pushpin")}
EVERYTHING = {"sent and committed": 1000, "received": 1000}
FAULTS = {
    "missing",
    "duplicated",
    "id is not the next number",
    "out of its sender's order",
    "out of commit order",
    "rolled back but received",
    "unknown",
    "stream-reset",
}


@pytest.fixture
def directory() -> Iterator[Path]:
    """A separate directory for a demo, so that its ports are separate, too."""
    with tempfile.TemporaryDirectory(prefix="demo-", dir=DIRECTORY) as name:
        Path(name).chmod(0o755)  # the usual mode of directories
        yield Path(name)


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment without the settings that the tests themselves run with."""
    return {k: v for k, v in os.environ.items() if "EVENTSTREAM" not in k and "DJANGO" not in k}


@pytest.fixture
def without_programs(environment: dict[str, str], directory: Path) -> dict[str, str]:
    """As on a machine that has only a shell and what the wheels contain."""
    shell = shutil.which("sh")
    assert shell
    programs = directory / "bin"
    programs.mkdir()
    (programs / "sh").symlink_to(shell)
    return {**environment, "PATH": str(programs)}


# Each test has one mode that is tried often.
SELDOM = (pytest.mark.faults, pytest.mark.thorough)


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("mode", ["pushpin", pytest.param("direct", marks=SELDOM)], indirect=True)
def test_check_finds_every_event_once_in_order_and_none_rolled_back(
    mode: str, directory: Path, environment: dict[str, str], without_programs: dict[str, str]
) -> None:
    arguments, way = MODES[mode]
    done = subprocess.run(
        [*DEMO, *arguments, "--check", f"--directory={directory}"],
        env=environment if mode == "pushpin" else without_programs,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    table = {
        name: {int(connected), int(away)}
        for name, connected, away in re.findall(
            r"^  (\w[^.\n]*)\.+(\d+)\.+(\d+)$", done.stdout, re.MULTILINE
        )
    }
    assert table == {name: {n} for name, n in EVERYTHING.items()} | {name: {0} for name in FAULTS}
    assert "100 more transactions rolled back" in done.stdout
    assert len(re.findall(r"events/s: p50 [\d.]+ ms, p99 [\d.]+ ms", done.stdout)) == 2
    assert done.stdout.startswith(f"pg_eventstream demo {way}, in {directory}\n")
    assert done.stdout.endswith(f"Everything arrived once, in commit order, {way}.\n")
    # Processes that a mode does not need do not run.
    for name in ("Pushpin", "Publisher"):
        assert (f"  {name}" in done.stdout) == (mode == "pushpin")


@pytest.fixture
def demo(
    mode: str, directory: Path, environment: dict[str, str]
) -> Iterator[Callable[[], tuple[Process, str]]]:
    """Starts the demo, possibly several times. Returns the process and the address it prints."""
    started: list[Process] = []

    def start() -> tuple[Process, str]:
        log = directory / f"demo-{len(started)}.log"
        process = Process(
            "the demo",
            [*DEMO, *MODES[mode][0], f"--directory={directory}"],
            log_path=log,
            environment=environment,
        )
        started.append(process)
        process.start(ready=lambda: "Ctrl-C" in log.read_text(), timeout=120)
        (url,) = re.findall(r"Open (\S+) in a browser", log.read_text())
        return process, url

    yield start
    for process in started:
        process.stop(timeout=30)


def text(page: Page, selector: str) -> str:
    return str(page.evaluate("selector => document.querySelector(selector).innerText", selector))


def rows(page: Page, list_id: str) -> list[list[str]]:
    """The cells of each row; the newest row is last."""
    found: list[list[str]] = page.evaluate(
        """list => Array.from(document.querySelectorAll(`#${list} > *`), row =>
            Array.from(row.children, cell => cell.innerText)).reverse()""",
        list_id,
    )
    return found


def wait_for_state(page: Page, state: str) -> None:
    # Not in the page, whose policy forbids eval().
    wait_until(lambda: state in text(page, "#state"), timeout=60)


def press(page: Page, how: str, message: str) -> None:
    page.evaluate(
        """([how, message]) => {
            document.querySelector("#text").value = message;
            document.querySelector(`button[value=${how}]`).click();
        }""",
        [how, message],
    )


@pytest.mark.faults
@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["direct", pytest.param("pushpin", marks=SELDOM)], indirect=True)
def test_page_shows_committed_events_and_continues_after_a_restart(
    mode: str, demo: Callable[[], tuple[Process, str]], page: Page
) -> None:
    first, url = demo()
    page.goto(url)
    wait_for_state(page, "connected")
    assert ("Pushpin" in text(page, "#way")) == (mode == "pushpin")
    for number, (what, name) in enumerate([("commit", "one"), ("rollback", "not this")], start=1):
        press(page, what, name)
        wait_until(lambda least=number: len(rows(page, "attempts")) == least, timeout=30)  # type: ignore[misc]
        wait_until(lambda: not any("…" in row for row in rows(page, "attempts")), timeout=30)
    by_name = {row[0].split("\n")[0]: row for row in rows(page, "attempts")}
    assert by_name["one"][2:4] == ["exists", "demo:1"]
    assert by_name["one"][-1].endswith("ms after the click")
    seen = page.evaluate("fetch('seen/1/').then(response => response.json())")
    assert seen == {"row": True, "id": "demo:1", "published": True}
    assert by_name["not this"][2:4] == ["none", "none"]
    assert by_name["not this"][-1].startswith("never")
    assert {len(row) for row in by_name.values()} == {6 if mode == "pushpin" else 5}

    first.stop(timeout=30)
    assert first.returncode == 0
    wait_for_state(page, "lost")
    assert demo()[1] == url
    # In a terminal, as the page says. Do not wait until the page has reconnected.
    subprocess.run(["sh", "-ec", text(page, "pre")], check=True, capture_output=True, timeout=30)
    wait_for_state(page, "connected")
    press(page, "commit", "two")
    wait_until(lambda: len(rows(page, "events")) >= 3, timeout=30)
    assert [(row[0], row[1]) for row in rows(page, "events")] == [
        ("demo:1", "one (counter: 1)"),
        ("demo:2", "Hello from psql"),
        ("demo:3", "two (counter: 2)"),
    ]
    assert [text for text in page.console if "Failed to load resource" not in text] == []


@pytest.fixture
def private(directory: Path) -> Iterator[Path]:
    """A directory that only root can use, with another one in it."""
    inner = directory / "root" / "project"
    inner.mkdir(parents=True)
    inner.parent.chmod(0o700)
    inner.chmod(0o750)
    yield inner
    for link in inner.rglob("elsewhere"):
        shutil.rmtree(link.resolve())


def rights(path: Path) -> dict[Path, tuple[int, int, int]]:
    """Owner, group and mode of all directories on the path to it, and of its content."""
    found = {p: p.lstat() for p in (*path.parents, path, *path.rglob("*"))}
    return {p: (s.st_uid, s.st_gid, s.st_mode) for p, s in found.items()}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")
@pytest.mark.parametrize("programs", ["reachable", "private"])
def test_root_keeps_its_directories_to_itself(private: Path, programs: str) -> None:
    bin_dir = Postgres(private / "unused").bin_dir
    if programs == "private":
        package = bin_dir.parents[1]
        for source in (package, package.with_name(f"{package.name}.libs")):
            shutil.copytree(source, private / source.name)
        bin_dir = private / bin_dir.relative_to(package.parent)
    before = rights(private)
    for run in range(2):  # the second run finds what the first one left
        with Postgres(private / "deep" / "postgres", bin_dir=bin_dir) as server:
            with psycopg.connect(server.dsn(), autocommit=True) as connection:
                query = "CREATE TABLE kept (n int)" if run == 0 else "SELECT * FROM kept"
                connection.execute(query)
            assert Path(f"/proc/{server.pid}").owner() == "nobody"
        after = rights(private)
        assert {path: after[path] for path in before} == before
    assert [path.name for path in (private / "deep").rglob("elsewhere")] == ["elsewhere"]


@pytest.mark.faults
@pytest.mark.thorough
@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")
def test_what_stood_in_for_a_directory_is_removed_after_that_is_gone(private: Path) -> None:
    servers = [Postgres(private / name) for name in ("gone", "gone-running", "kept", "new")]
    places = []
    with servers[1]:
        for server in servers:
            if server is not servers[1]:
                with server:
                    pass
            places.append(server.data.parent)
            if server is servers[2]:
                for name in ("gone", "gone-running"):
                    shutil.rmtree(private / name)
        assert [place.exists() for place in places] == [False, True, True, True]
    shutil.rmtree(places[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")
def test_root_is_told_which_programs_its_server_cannot_run(private: Path) -> None:
    programs = private / "bin"
    programs.mkdir()
    (programs / "postgres").touch(0o755)
    before = rights(private)
    with pytest.raises(ServerError, match=f"nobody cannot run the programs in {programs}"):
        Postgres(private / "postgres", bin_dir=programs).start()
    after = rights(private)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize(
    ("variables", "needs_pushpin"), [([], False), (["PROXY=pushpin", "ARGS=--check"], True)]
)
def test_make_needs_pushpin_only_if_it_is_used(variables: list[str], needs_pushpin: bool) -> None:
    # As a user calls it; the tests themselves could have been started by make.
    ours = ("MAKEFLAGS", "MAKELEVEL", "ARGS", "PROXY")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    done = subprocess.run(
        ["make", "--dry-run", "demo", *variables], env=environment,
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert (".ci/need" in done.stdout) == needs_pushpin
    *_, last = done.stdout.splitlines()
    wanted = ["--proxy", "pushpin", "--check"] if needs_pushpin else []
    assert last.split() == [".venv/bin/python", "-m", "pg_eventstream.demo", *wanted]


def test_missing_pushpin_is_an_error_that_says_how_to_install_it(
    directory: Path, without_programs: dict[str, str]
) -> None:
    done = subprocess.run(
        [*DEMO, "--proxy=pushpin", f"--directory={directory}"],
        env=without_programs,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "apt-get install pushpin" in done.stderr


def test_unknown_proxy_is_an_error_that_names_those_that_are_known() -> None:
    done = subprocess.run(
        [*DEMO, "--proxy", "nginx"], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"--proxy: invalid choice: 'nginx' \(choose from '?pushpin'?\)", done.stderr)
