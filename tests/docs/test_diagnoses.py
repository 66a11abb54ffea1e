"""The page on diagnoses explains every code that the commands can find, and no other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from pg_eventstream import operate
from pg_eventstream.grip import signature
from pg_eventstream.operate import findings
from pg_eventstream.operate.doctor import opening
from tests.support.documentation import text_of

PAGE = "docs/production/diagnoses.md"
_SOURCE = "".join(
    path.read_text(encoding="utf-8") for path in Path(operate.__path__[0]).rglob("*.py")
)


def test_every_code_is_explained() -> None:
    codes = set(re.findall(r'\b(?:code=|(?:broken|degraded)\(\s*)"([a-z-]+)"', _SOURCE))
    codes |= {code for code, _ in findings._PROBLEMS.values()} | {"check-failed"}
    codes |= set(opening.TROUBLES)
    codes |= set(re.findall(r'\bUnverified\(\s*"([a-z-]+)"', inspect.getsource(signature)))
    explained = re.findall(r"^### (.+)$", text_of(PAGE), re.MULTILINE)
    assert sorted(explained) == sorted(codes)


def test_explanations_begin_with_the_level() -> None:
    sections = re.split(r"^### .+$", text_of(PAGE), flags=re.MULTILINE)[1:]
    assert [text for text in sections if not re.match(r"\n\n\*(Broken|Degraded)\b", text)] == []
