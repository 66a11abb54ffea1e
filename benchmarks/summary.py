"""The results as plots, and as the table in the README."""

from __future__ import annotations

import json
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
    "fanout",
    "followed",
    "slow_client",
)
README = Path(__file__).parent.parent / "README.md"
_BEGIN, _END = "<!-- benchmarks -->\n", "<!-- end of benchmarks -->\n"


def write(names: Iterable[str], quick: bool = False) -> None:
    """Plot these; show a quick run's table, or put that of all full runs into the README."""
    suffix = "-quick" if quick else ""
    results = [read(name + suffix) for name in names]
    for name, result in zip(names, results, strict=True):
        plot(result, RESULTS / f"{name}{suffix}.svg")
    if quick:
        print("\n" + table(results))
    else:
        README.write_text(with_table(README.read_text()))


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def with_table(readme: str) -> str:
    """The README with the table of all full runs that are stored, and their plots."""
    names = [name for name in NAMES if (RESULTS / f"{name}.json").exists()]
    before, _, rest = readme.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    assert after, "the README has lost its marks"
    found = table(map(read, names)) + plots(names)
    return f"{before}{_BEGIN}{found}{_END}{after}"


def plots(names: Iterable[str]) -> str:
    """What GitHub folds up until it is clicked."""
    folder = RESULTS.relative_to(README.parent).as_posix()
    images = [f"![{name}]({folder}/{name}.svg)\n" for name in names]
    return "\n".join(["\n<details><summary>The same as plots</summary>\n", *images, "</details>\n"])


def table(results: Iterable[dict[str, Any]]) -> str:
    lines = [
        "| what is measured | ours | compared with | ratio (range of rounds) | goal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results:
        lines.append(f"| **`{result['command']}`** | | | | |")
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
    """Each way's median, and the range of its rounds, one panel per comparison."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "pg_eventstream"  # the same figures give the same file
    mpl.rcParams["svg.fonttype"] = "none"  # text, and not the outlines of its letters
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
