"""The tests, files and settings that the documentation names exist."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.support.documentation import ROOT, name_of, pages, text_of

PAGES = [name_of(page) for page in pages()]


@cache
def names_of_tests() -> set[str]:
    return {
        node.name
        for module in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    }


@pytest.mark.parametrize("name", PAGES)
def test_every_test_that_a_promise_names_is_there(name: str) -> None:
    named = re.findall(r"`(test_\w+)`", text_of(name))
    assert [test for test in named if test not in names_of_tests()] == []


def test_promises_name_their_tests() -> None:
    for name in ("README.md", "docs/concepts/guarantees.md", "docs/reference/sql.md"):
        assert len(re.findall(r"`test_\w+`", text_of(name))) > 5, name


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_names_is_there(name: str) -> None:
    named = re.findall(r"`((?:tests|benchmarks|migrations|docs)/[\w./-]*)`", text_of(name))
    assert [file for file in named if not (ROOT / file).exists()] == []


def test_readme_is_a_front_door() -> None:
    assert len(text_of("README.md").splitlines()) <= 200
