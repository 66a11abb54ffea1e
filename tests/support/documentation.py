"""The documentation as tests read it: its pages, and the examples in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"

# Blocks that are not examples: diagrams, output, and text that no program runs.
NOT_RUN = {"text"}
_FENCE = re.compile(r"^( *)(`{3,}|~{3,}|:{3,})(.*)$")
_PATH = re.compile(r"(?:#|//|--|<!--|;) ([\w./-]+\.\w+)(?: -->)?\n")


@dataclass(frozen=True)
class Example:
    """A fenced block. Blocks with the same text are one example."""

    language: str
    code: str

    @property
    def path(self) -> str | None:
        """The file that it belongs to, if its first line says so."""
        found = _PATH.match(self.code)
        return found and found[1]


def pages() -> list[Path]:
    """All pages that people read, apart from docstrings."""
    built = DOCS / "_build"
    found = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "migrations").glob("*.md")]
    return sorted(page for page in found if built not in page.parents)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def text_of(name: str) -> str:
    """A page by its path from the root, such as ``docs/quickstart.md``."""
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def examples_of(name: str) -> list[Example]:
    return list(_examples(text_of(name)))


def example(name: str, words: str) -> Example:
    """The only example of a page that contains these words.

    A call of this function, with two literals, declares that a test runs the example:
    `tests/docs/test_examples_are_run.py` looks for these calls.
    """
    (found,) = {one for one in examples_of(name) if words in one.code}
    return found


def prose_of(name: str) -> str:
    """A page without its fenced blocks."""
    return "\n".join(line for line, block in _lines(text_of(name)) if block is None)


@dataclass(eq=False)
class _Block:
    indent: str
    fence: str
    language: str
    lines: list[str]


def _examples(text: str) -> Iterator[Example]:
    for block in dict.fromkeys(block for _, block in _lines(text) if block is not None):
        if block.language not in NOT_RUN:
            lines = [line.removeprefix(block.indent) for line in block.lines]
            yield Example(block.language, "".join(f"{line}\n" for line in lines))


def _lines(text: str) -> Iterator[tuple[str, _Block | None]]:
    """Yield each line and the block that contains it. The content of a directive is text."""
    block: _Block | None = None
    directives: list[str] = []
    for line in text.splitlines():
        fence = _FENCE.match(line)
        if block is not None:
            yield line, block
            if line.strip() == block.fence:
                block = None
            else:
                block.lines.append(line)
        elif fence is None:
            yield line, None
        elif directives and line.strip() == directives[-1]:
            directives.pop()
            yield line, None
        elif fence[3].startswith("{"):
            directives.append(fence[2])
            yield line, None
        else:
            block = _Block(fence[1], fence[2], fence[3].strip(), [])
            yield line, block
