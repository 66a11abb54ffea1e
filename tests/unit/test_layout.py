"""The layout of the tests: what each folder needs, and that no test file depends on another."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.folders import misplaced

TESTS = Path(__file__).parents[1]
FILES = sorted(
    path for path in TESTS.rglob("*.py") if "fixtures" not in path.relative_to(TESTS).parts
)


def imported(source: str) -> Iterator[str]:
    """The modules that a test file can import, also within functions.

    "from tests.a import b" can mean the module tests.a.b.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def is_of_tests(module: str) -> bool:
    """Whether pytest collects this module or reads fixtures from it."""
    name = module.rpartition(".")[2]
    return module.startswith(("tests.", ".")) and (name.startswith("test_") or name == "conftest")


@pytest.mark.parametrize(
    "statement",
    [
        "from tests.faults.test_crash import seeded",
        "from tests.faults import test_crash",
        "import tests.faults.test_crash as crash",
        "from .test_crash import seeded",
        "from . import test_crash",
        "def later():\n    from tests.conftest import database",
        "from tests import conftest",
    ],
)
def test_import_of_a_test_is_found(statement: str) -> None:
    assert [module for module in imported(statement) if is_of_tests(module)]


def test_no_file_imports_a_test_or_a_conftest() -> None:
    assert len(FILES) > 100
    wrong = [
        f"{path.relative_to(TESTS)} imports {module}; move what it needs into tests/support"
        for path in FILES
        for module in imported(path.read_text(encoding="utf-8"))
        if is_of_tests(module)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("folder", "fixtures", "started"),
    [
        ("unit", ["tmp_path", "control"], ""),
        ("unit", ["database", "postgres"], "postgres"),
        ("integration", ["database", "postgres"], ""),
        ("endpoint", ["postgres", "pushpin", "app"], "app, pushpin"),
        ("acceptance", ["postgres", "pushpin", "app"], ""),
    ],
)
def test_test_that_starts_too_much_is_refused(
    folder: str, fixtures: list[str], started: str
) -> None:
    reason = misplaced(folder, fixtures)
    assert (f"do not start {started};" in reason) if started else reason == ""


@pytest.mark.faults
@pytest.mark.thorough
def test_unit_tests_need_no_server(tmp_path: Path) -> None:
    """All but those that start a Python themselves, where there is no other program."""
    files = [
        path
        for path in (TESTS / "unit").glob("test_*.py")
        if "import subprocess" not in path.read_text(encoding="utf-8")
    ]
    assert len(files) > 4
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=TESTS.parent,
        env={**os.environ, "PATH": str(tmp_path), "PG_EVENTSTREAM_TEST_POSTGRES": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def that_look_whether_they_are_thorough(tree: ast.Module) -> Iterator[str]:
    """The test functions of a file that do, also by a constant or by another function."""
    names = {"THOROUGH"}
    own = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]

    def uses(node: ast.AST) -> bool:
        return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))

    for _ in range(3):  # constants of constants
        for node in own:
            if isinstance(node, ast.Assign) and uses(node.value):
                names |= {t.id for one in node.targets for t in ast.walk(one)
                          if isinstance(t, ast.Name)}  # fmt: skip
            elif isinstance(node, ast.FunctionDef) and uses(node):
                names.add(node.name)
    yield from (name for name in names if name.startswith("test_"))


def test_what_is_longer_in_make_test_faults_is_run_there() -> None:
    for path in FILES:
        source = path.read_text()
        if not path.name.startswith("test_") or path == Path(__file__):
            continue
        tree = ast.parse(source) if "THOROUGH" in source else ast.Module([], [])
        marks = {
            node.name: "\n".join(map(ast.unparse, node.decorator_list))
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
        }
        everywhere = "mark.faults" in source.partition("pytestmark")[2][:200]
        for name in that_look_whether_they_are_thorough(tree):
            assert everywhere or "mark.faults" in marks[name], name
