"""What the tests of each folder may start."""

from __future__ import annotations

from collections.abc import Iterable

#: The fixtures that start a program.
_STARTING = {
    *("postgres", "pushpin", "second_pushpin", "app", "serve", "new_publisher"),
    *("browser", "node_directory"),
}
#: The folders whose tests need only wheels (`make quick`), and what these tests may start.
_MAY_START: dict[str, set[str]] = {
    "unit": set(),
    "integration": {"postgres"},
    "endpoint": {"postgres"},
}


def misplaced(folder: str, fixtures: Iterable[str]) -> str:
    """Why a test with these fixtures does not belong in the folder; empty if it does."""
    if folder not in _MAY_START:
        return ""
    started = _STARTING.intersection(fixtures) - _MAY_START[folder]
    if not started:
        return ""
    return (
        f"tests in {folder}/ do not start {', '.join(sorted(started))}; move it to acceptance/"
        " or faults/"
    )
