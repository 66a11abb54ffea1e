"""Imports run one way: the modules that each folder of the package may import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pg_eventstream

PACKAGE = Path(pg_eventstream.__file__).parent
ROOT = "pg_eventstream"


def name_of(path: Path) -> str:
    """The dotted name of a module without the package: ``grip.items``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts[:-2]
}


def imported_by(module: str, *, lazily: bool = True) -> set[str]:
    """The modules of the package that it imports; with ``lazily``, also inside functions."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if lazily else iter(tree.body)
    found = {name for node in nodes for name in names_in(node, module)}
    return (found & MODULES.keys()) - {module, ""}


def names_in(node: ast.AST, module: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name.removeprefix(f"{ROOT}.")
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            is_package = MODULES[module].name == "__init__.py"
            parents = module.split(".") if module else []
            parents = parents[: len(parents) - node.level + is_package]
            base = ".".join([*parents, *filter(None, [node.module])])
        elif base.split(".")[0] != ROOT:
            return
        else:
            base = base.removeprefix(ROOT).removeprefix(".")
        yield base
        for alias in node.names:
            yield f"{base}.{alias.name}".removeprefix(".")


def is_in(module: str, folder: str) -> bool:
    return module == folder or module.startswith(f"{folder}.")


#: The only modules of the package that these folders may import, besides their own.
MAY_IMPORT = {
    "postgres": {"limits"},
    "servers": set(),
    "limits": set(),
    "backoff": set(),
    "errors": set(),
}
#: The modules that a folder must not import.
MUST_NOT_IMPORT = {
    "grip": ["streams", "publisher", "endpoint", "views", "management", "operate", "consumers"],
    "streams": ["grip", "publisher", "endpoint", "views", "management", "operate", "consumers"],
    "publisher": ["streams", "endpoint", "views", "management", "operate", "consumers"],
    "tables": ["grip", "streams", "publisher", "endpoint", "views"],
    "operate": ["publisher", "views", "management", "admin"],
    "consumers": [
        *("grip", "streams", "publisher", "endpoint", "views", "management", "admin", "operate")
    ],
    "send": ["operate", "consumers"],
    "endpoint": ["operate", "consumers"],
    "demo": ["publisher", "grip", "streams", "postgres"],
}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folder_imports_no_more_than_it_may(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder}
    for module in MODULES:
        if is_in(module, folder):
            others = {
                name
                for name in imported_by(module)
                if not any(is_in(name, allowed_one) for allowed_one in allowed)
            }
            assert others == set(), module


@pytest.mark.parametrize("folder", MUST_NOT_IMPORT)
def test_folder_does_not_import_what_is_above_it_or_beside_it(folder: str) -> None:
    for module in MODULES:
        if is_in(module, folder):
            for name in imported_by(module):
                for other in MUST_NOT_IMPORT[folder]:
                    assert not is_in(name, other), (module, name)


def test_publisher_is_imported_by_the_commands_alone() -> None:
    importers = {
        module
        for module in MODULES
        if not is_in(module, "publisher")
        and any(is_in(name, "publisher") for name in imported_by(module))
    }
    assert importers
    assert all(is_in(module, "management") for module in importers), importers


def test_streams_and_grip_meet_in_the_endpoint_alone() -> None:
    def imports(module: str, folder: str) -> bool:
        return any(is_in(name, folder) for name in imported_by(module))

    meeting = [m for m in MODULES if imports(m, "streams") and imports(m, "grip")]
    assert meeting == ["endpoint"]


def test_no_imports_go_round_in_a_circle() -> None:
    graph = {module: imported_by(module, lazily=False) for module in MODULES if module}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_every_folder_says_what_it_is_for() -> None:
    """And names each of its modules, so that a reader finds the file for a change."""
    for init in PACKAGE.rglob("__init__.py"):
        folder = name_of(init)
        modules = [path.stem for path in init.parent.glob("*.py") if path != init]
        if folder.rpartition(".")[2] in ("migrations", "commands"):
            continue  # the files are named by Django's rules
        tour = (ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or "").split()
        assert len(tour) > 10, folder or ROOT
        words = {word.strip("`*.,:;/()") for word in tour}
        missing = [m for m in modules if m not in words | {"apps", "urls", "__main__"}]
        assert missing == [], folder or ROOT
