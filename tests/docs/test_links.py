"""Every link within the documentation works. The check needs no network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.documentation import ROOT, name_of, pages, prose_of

PAGES = [name_of(page) for page in pages()]
_LINK = re.compile(r"\]\(<?([^()\s>]+(?:\([^()]*\))?[^()\s>]*)>?\)")
_ABSOLUTE = re.compile(r"[a-z][a-z0-9+.-]*:")


def links_of(name: str) -> Iterator[str]:
    prose = re.sub(r"`[^`\n]+`", "code", prose_of(name))
    yield from (link for link in _LINK.findall(prose) if not _ABSOLUTE.match(link))


def anchors_of(name: str) -> set[str]:
    """The anchors that forges and MyST make of headings: https://github.com/Flet/github-slugger"""
    anchors: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose_of(name), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        base = anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        n = 0
        while anchor in anchors:
            n += 1
            anchor = f"{base}-{n}"
        anchors.add(anchor)
    anchors.update(re.findall(r"^\(([\w-]+)\)=$", prose_of(name), re.MULTILINE))
    return anchors


def problem_of(name: str, link: str) -> str | None:
    path, _, anchor = link.partition("#")
    target = (ROOT / name).parent / unquote(path) if path else ROOT / name
    if not target.exists():
        return f"{name}: {link}: there is no {path}"
    if anchor and anchor not in anchors_of(name_of(target.resolve())):
        return f"{name}: {link}: {path or name} has no heading #{anchor}"
    return None


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    assert [problem for link in links_of(name) if (problem := problem_of(name, link))] == []


def test_link_that_leads_nowhere_is_noticed() -> None:
    assert "there is no away.md" in (problem_of("README.md", "away.md") or "")
    assert "no heading #away" in (problem_of("README.md", "#away") or "")
    assert "no heading #away" in (problem_of("README.md", "docs/moving.md#away") or "")
    assert problem_of("README.md", "docs/moving.md#what-is-different") is None


def test_every_page_is_looked_at() -> None:
    assert {"README.md", "SECURITY.md", "CHANGELOG.md", "docs/index.md"} <= set(PAGES)
    assert sum(1 for name in PAGES for _ in links_of(name)) > 100


def test_every_page_of_the_documentation_is_in_a_table_of_contents() -> None:
    listed = {"docs/index.md"}
    for name in PAGES:
        if name.endswith("/index.md"):
            folder = Path(name).parent
            text = (ROOT / name).read_text(encoding="utf-8")
            for toctree in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL):
                entries = [line for line in toctree.splitlines() if line and line[0] != ":"]
                listed |= {(folder / f"{entry}.md").as_posix() for entry in entries}
    assert listed == {name for name in PAGES if name.startswith("docs/")}
