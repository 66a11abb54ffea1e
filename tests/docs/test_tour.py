"""The docstring of each folder of the package is a tour of its modules."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pg_eventstream

PACKAGE = Path(pg_eventstream.__file__).parent


def test_every_module_has_its_place_in_the_tour() -> None:
    for init in PACKAGE.rglob("__init__.py"):
        tour = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        if init.parent.name in {"demo", "migrations", "templatetags", "management", "commands"}:
            continue
        for module in init.parent.glob("*.py"):
            named = re.search(rf"\b{module.stem}\b", tour)
            assert module.stem in {"__init__", "apps", "urls"} or named, module
