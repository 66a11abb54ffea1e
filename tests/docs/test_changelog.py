"""The changelog follows Keep a Changelog and begins with the version in development."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_each_version_says_what_kind_of_change_it_lists() -> None:
    versions = re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]
    assert versions
    for version in versions:
        kinds = re.findall(r"^### (.*)$", version, re.MULTILINE)
        assert kinds
        assert kinds == [kind for kind in KINDS if kind in kinds], version.splitlines()[0]


def test_newest_version_is_that_of_the_package() -> None:
    [version] = re.findall(r'^version = "(.*)"', PYPROJECT, re.MULTILINE)
    headings = re.findall(r"^## \[(.*?)\](.*)$", CHANGELOG, re.MULTILINE)
    name, rest = headings[0]
    if name == "Unreleased":
        assert rest == ""
        [announced] = re.findall(r"^This will be ([\d.]+)\b", CHANGELOG, re.MULTILINE)
        assert announced == version
    else:
        assert name == version
        assert re.fullmatch(r" - \d{4}-\d\d-\d\d", rest)
