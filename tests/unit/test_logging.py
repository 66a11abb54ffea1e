"""Log records have constant messages, stable names and documented fields."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pg_eventstream
from tests.support.documentation import text_of

PACKAGE = Path(pg_eventstream.__file__).parent
METHODS = {"debug", "info", "warning", "error", "critical", "exception", "log"}
#: Attributes of all records, which `extra` must not overwrite.
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime"}
PAGE = "docs/production/logging.md"


@cache
def calls() -> list[tuple[str, ast.Call]]:
    """Each logging call of the package, with its place."""
    return [(f"{path.name}:{call.lineno}", call) for path, call in _calls()]


def _calls() -> Iterator[tuple[Path, ast.Call]]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr=name)) if (
                    name in METHODS
                ):
                    yield path, node


def fields_of(call: ast.Call) -> dict[str, ast.expr]:
    for keyword in call.keywords:
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Dict):
            names = [
                key.value if isinstance(key, ast.Constant) else key for key in keyword.value.keys
            ]
            assert all(isinstance(name, str) for name in names)
            return dict(zip(map(str, names), keyword.value.values, strict=True))
    return {}


def documented() -> dict[str, set[str]]:
    """The events of the page, with their fields."""
    rows = re.findall(r"^\| `([a-z-]+)` \| \w+ \| (.*?) ?\| ", text_of(PAGE), re.MULTILINE)
    assert len(rows) == len(dict(rows))
    return {name: set(re.findall(r"`(\w+)`", fields)) for name, fields in rows}


def test_messages_are_constant() -> None:
    assert len(calls()) > 40
    for place, call in calls():
        assert isinstance(call.func, ast.Attribute)
        message = call.args[1 if call.func.attr == "log" else 0]
        assert isinstance(message, ast.Constant), place
        assert isinstance(message.value, str), place


def test_events_and_fields_are_documented() -> None:
    used: dict[str, set[str]] = {}
    for place, call in calls():
        fields = fields_of(call)
        event = fields.pop("event", None)
        assert isinstance(event, ast.Constant), f"{place} has no event"
        assert not fields.keys() & STANDARD, place
        used.setdefault(str(event.value), set()).update(fields)
    assert used == documented()


def test_all_loggers_are_in_one_tree() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for name in re.findall(r"getLogger\((.*?)\)", source):
            assert name == "__name__" or name.strip('"').split(".")[0] == "pg_eventstream", path
        assert not re.search(r"\blogging\.(debug|info|warning|error|exception)\(", source), path
