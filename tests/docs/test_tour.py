"""The README names what there is, and nothing that there is not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pg_eventstream
from pg_eventstream.conf import Conf

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_setting_is_documented() -> None:
    source = Path(pg_eventstream.__file__).with_name("conf.py").read_text(encoding="utf-8")
    used = set(re.findall(r'"((?:EVENTSTREAM|GRIP)_[A-Z_]+)"', source))
    assert len(used) >= len([name for name in vars(Conf) if not name.startswith("_")])
    named = set(re.findall(r"`((?:EVENTSTREAM|GRIP)_[A-Z_]+)`", README))
    # Those of django-eventstream that a project removes.
    assert named - {"EVENTSTREAM_STORAGE_CLASS", "EVENTSTREAM_REDIS"} == used


def test_every_command_is_documented() -> None:
    commands = Path(pg_eventstream.__file__).parent / "management" / "commands"
    for command in commands.glob("eventstream_*.py"):
        assert f"manage.py {command.stem}" in README


def test_every_public_name_is_documented() -> None:
    assert [name for name in pg_eventstream.__all__ if f"`{name}" not in README] == []


def test_every_file_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"`((?:tests|benchmarks|migrations)/[\w./]*)`", README))
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_module_has_its_place_in_the_tour() -> None:
    package = Path(pg_eventstream.__file__).parent
    for init in package.rglob("__init__.py"):
        tour = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        if init.parent.name in {"demo", "migrations", "templatetags", "management", "commands"}:
            continue
        for module in init.parent.glob("*.py"):
            named = re.search(rf"\b{module.stem}\b", tour)
            assert module.stem in {"__init__", "apps", "urls"} or named, module
