"""The messages that the page on troubleshooting quotes are those of the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pg_eventstream
from tests.support.documentation import text_of

PAGE = text_of("docs/production/troubleshooting.md")
# PostgreSQL's own.
_THEIRS = PAGE[PAGE.index("## Sending fails") : PAGE.index("## Every event comes several times")]


def quoted() -> list[str]:
    page = PAGE.replace(_THEIRS, "")
    in_quotes = re.findall(r"^ *> `(.+)`$", page, re.MULTILINE)
    in_tables = [
        message
        for cell in re.findall(r"^\| (`.+?) \| ", page, re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", cell)
    ]
    return in_quotes + in_tables


@cache
def said() -> str:
    """All texts of the package, with an ellipsis for each variable part."""
    texts = []
    for module in Path(pg_eventstream.__file__).parent.rglob("*.py"):
        tree = ast.parse(module.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (n.value if isinstance(n, ast.Constant) else "…" for n in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%(?:\.\d+f|[srd])", "…", node.value).replace("%%", "%"))
    return "\n".join(texts)


def unsaid(message: str) -> list[str]:
    """The constant parts of a message that no text of the package contains."""
    parts = [part.strip() for part in message.split("…")]
    return [part for part in parts if part.strip(" :;,.()") and part not in said()]


def test_every_message_is_one_of_the_code() -> None:
    messages = quoted()
    assert len(messages) > 30
    assert {message: parts for message in messages if (parts := unsaid(message))} == {}


def test_message_that_is_not_in_the_code_is_noticed() -> None:
    assert unsaid("The publisher … has gone fishing.") == ["has gone fishing."]
