"""Writes the results as plots, and as tables in the documentation."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .report import RESULTS, Comparison, number

NAMES = (
    "send",
    "latency",
    "drain",
    "log_size",
    "slices",
    "vacuum",
    "recover",
    "prune",
    "idle",
    "held_snapshot",
    "consume",
    "consume_held",
    "fanout",
    "followed",
    "slow_client",
)
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
_MARKED = re.compile(
    r"(?P<begin><!-- results of (?P<name>\w+) -->\n).*?(?P<end><!-- end of results -->\n)",
    re.DOTALL,
)
_SYSTEM = ("processor", "cores", "system")


def write(names: Iterable[str], quick: bool = False) -> None:
    """Write the plots. Print the tables of a quick run, or update the documentation."""
    suffix = "-quick" if quick else ""
    results = [read(name + suffix) for name in names]
    for name, result in zip(names, results, strict=True):
        plot(result, RESULTS / f"{name}{suffix}.svg")
    if quick:
        print("\n".join(map(table, results)))
    else:
        PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def with_results(page: str) -> str:
    """The page with the stored results of full runs between its markers."""
    return _MARKED.sub(
        lambda marked: f"{marked['begin']}\n{section(read(marked['name']))}\n{marked['end']}", page
    )


def named(page: str) -> list[str]:
    """The benchmarks that the page has markers for."""
    return [marked["name"] for marked in _MARKED.finditer(page)]


def section(result: dict[str, Any]) -> str:
    """One benchmark: its table, its other counts, how and when it was run, and its plot."""
    parts = [table(result)]
    if result["facts"]:
        counted = (f"- {fact}: {_fact(value)}\n" for fact, value in result["facts"].items())
        parts.append("Also counted:\n\n" + "".join(counted))
    machine = dict(result["machine"])
    processor, cores, system = (machine.pop(name) for name in _SYSTEM)
    versions = ", ".join(f"{name} {version}" for name, version in machine.items())
    parts.append(
        f"`{result['command']}` on {result['when']}: {processor}, {cores} cores, {system};"
        f" {versions}.\n"
    )
    folder = os.path.relpath(RESULTS, PAGE.parent)
    parts.append(f"![{result['about']}]({folder}/{result['benchmark']}.svg)\n")
    return "\n".join(parts)


def _fact(value: float | str) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(result: dict[str, Any]) -> str:
    lines = [
        "| what is measured | ours | compared with | ratio (range of rounds) | goal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for comparison in map(Comparison.from_json, result["comparisons"]):
        ours = f"{number(comparison.median(comparison.ours))} {comparison.unit}"
        for ratio in comparison.ratios:
            base = f"{ratio.base}: {number(comparison.median(ratio.base))}"
            goal = "" if ratio.goal is None else str(ratio.goal)
            if ratio.goal is not None and not ratio.goal.is_met(ratio.median):
                goal += ", missed"
            lines.append(
                f"| {comparison.what} | {ours} | {base}"
                f" | {ratio.median:.2f} ({ratio.range}) | {goal} |"
            )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot the median of each way and the range of its rounds, one panel per comparison."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "pg_eventstream"  # the same figures give the same file
    mpl.rcParams["svg.fonttype"] = "none"  # as text instead of outlines
    comparisons = [Comparison.from_json(stored) for stored in result["comparisons"]]
    bars = [len(comparison.rounds) for comparison in comparisons]
    height = sum(bars) * 0.3 + len(bars) * 0.75 + 0.8
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(len(comparisons), 1, squeeze=False, height_ratios=bars)[:, 0]
    for panel, comparison in zip(axes, comparisons, strict=True):
        for n, (way, figures) in enumerate(comparison.rounds.items()):
            middle = comparison.median(way)
            panel.barh(
                n, middle, color="#1f6feb" if way == comparison.ours else "#b8c0cc",
                xerr=[[middle - min(figures)], [max(figures) - middle]],
                error_kw={"ecolor": "#444", "capsize": 2, "lw": 0.8},
            )  # fmt: skip
            panel.annotate(f" {number(middle)}", (max(figures), n), va="center", fontsize=8)
        panel.set_yticks(range(len(comparison.rounds)), list(comparison.rounds), fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.12)
        panel.tick_params(axis="x", labelsize=8)
        panel.set_xlabel(comparison.unit, fontsize=8)
        panel.set_title(comparison.what, loc="left", fontsize=9, fontweight="bold")
        panel.spines[["top", "right"]].set_visible(False)
    machine = result["machine"]
    figure.suptitle(
        f"{result['about']}\n{result['command']}, {machine['processor']},"
        f" {machine['cores']} cores, medians and ranges",
        fontsize=8,
    )
    figure.savefig(path, metadata={"Date": None})
