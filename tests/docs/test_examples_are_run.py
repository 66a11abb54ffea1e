"""A test runs every example in the documentation."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.support.documentation import Example, example, examples_of, name_of, pages

PAGES = [name_of(page) for page in pages()]


@cache
def claimed() -> set[Example]:
    """The examples that tests run, by their calls of `example` with two literals."""
    found: set[Example] = set()
    for module in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Name(id="example"),
                    args=[ast.Constant(value=str() as name), ast.Constant(value=str() as words)],
                ):
                    found.add(example(name, words))
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_example_is_run_by_a_test(name: str) -> None:
    run = claimed()
    assert [f"{one.language}:\n{one.code}" for one in examples_of(name) if one not in run] == []


def test_example_that_no_test_runs_is_noticed() -> None:
    assert Example("python", "1 / 0\n") not in claimed()


@pytest.mark.parametrize("name", PAGES)
def test_every_block_says_its_language(name: str) -> None:
    assert [one.code for one in examples_of(name) if not one.language] == []
