"""The figures that a soak samples, and which of them may not grow."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pg_eventstream.servers.processes import children
from tests.support.database import Database

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Margin:
    """The median of the last third may exceed that of the first by this factor and this amount."""

    times: float
    plus: float

    def __str__(self) -> str:
        return f"{self.times:g} times and {self.plus:g} more"


#: By the end of a figure's name. Latencies have room for other work of the machine.
MARGINS = {
    "p50 ms": Margin(2, 10),
    "p99 ms": Margin(2, 200),
    "MB": Margin(1.1, 4),
    "fds": Margin(1, 4),
    "threads": Margin(1, 3),
    "connections": Margin(1, 4),
    "tables MB": Margin(1.3, 4),
    "rows": Margin(1.2, 2000),
    "dead": Margin(1.5, 20_000),
}


def of_process(name: str, pid: int) -> dict[str, float]:
    """Its private memory, open descriptors and threads; nothing if it has ended."""
    with suppress(OSError):
        return {
            f"{name} MB": memory(pid),
            f"{name} fds": len(os.listdir(f"/proc/{pid}/fd")),
            f"{name} threads": len(os.listdir(f"/proc/{pid}/task")),
        }
    return {}


def memory(pid: int) -> float:
    """Its private memory in MB, without shared memory and mapped files."""
    with Path(f"/proc/{pid}/smaps_rollup").open() as rollup:
        return sum(int(line.split()[1]) for line in rollup if line.startswith("Pss_Anon:")) / 1024


def of_children(name: str, pid: int) -> dict[str, float]:
    """The memory of a process and its children."""
    total = 0.0
    for each in (pid, *children(pid)):
        with suppress(OSError):
            total += memory(each)
    return {f"{name} MB": total}


def of_database(database: Database) -> dict[str, float]:
    """The number of connections and the sizes of the tables."""
    with database.connect(application_name="figures") as connection:
        row = connection.execute(
            """
            SELECT (SELECT count(*) FROM pg_stat_activity
                     WHERE backend_type = 'client backend' AND application_name <> 'figures'),
                   sum(pg_total_relation_size(relid)) / 1e6,
                   (SELECT count(*) FROM pg_eventstream_stream),
                   sum(n_dead_tup),
                   (SELECT coalesce(extract(epoch FROM now() - min(sequenced_at)), 0)
                      FROM pg_eventstream_stream)
              FROM pg_stat_user_tables WHERE relname LIKE 'pg\\_eventstream\\_%'
            """
        ).fetchone()
    assert row
    names = ("connections", "tables MB", "rows", "dead", "oldest s")
    return dict(zip(names, map(float, row), strict=True))


def of_latencies(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {
        "p50 ms": 1000 * ordered[len(ordered) // 2],
        "p99 ms": 1000 * ordered[len(ordered) * 99 // 100],
    }


def growth(samples: Sequence[Figures]) -> list[str]:
    """The figures that are higher at the end than they should be, each with its earlier value."""
    third = len(samples) // 3
    grown: list[str] = []
    for name in dict.fromkeys(name for sample in samples for name in sample):
        margin = _margin(name)
        first, last = _median(samples[:third], name), _median(samples[-third:], name)
        if margin is None or first is None or last is None:
            continue
        if last > first * margin.times + margin.plus:
            grown.append(
                f"{name}: {first:.1f} in the first third, {last:.1f} in the last;"
                f" it may be {margin}"
            )
    return grown


def _margin(name: str) -> Margin | None:
    if name in MARGINS:
        return MARGINS[name]
    return next((MARGINS[end] for end in MARGINS if name.endswith(f" {end}")), None)


def _median(samples: Sequence[Figures], name: str) -> float | None:
    values = [sample[name] for sample in samples if name in sample]
    return statistics.median(values) if values else None


def heading(names: Sequence[str]) -> str:
    return " ".join(f"{name:>{_width(name)}}" for name in names)


def line(figures: Figures, names: Sequence[str]) -> str:
    return " ".join(
        f"{figures[name]:>{_width(name)}.{0 if figures[name] >= 1000 else 1}f}"
        if name in figures
        else " " * _width(name)
        for name in names
    )


def _width(name: str) -> int:
    return max(6, len(name))


def summary(samples: Sequence[Figures]) -> str:
    """The median of each figure in each third of the time."""
    third = max(1, len(samples) // 3)
    parts = (samples[:third], samples[third:-third], samples[-third:])
    lines = [f"{'median of each third':<24}{'first':>10}{'second':>10}{'last':>10}   may be"]
    for name in dict.fromkeys(name for sample in samples for name in sample):
        medians = [_median(part, name) for part in parts]
        shown = "".join(f"{'-' if m is None else f'{m:.1f}':>10}" for m in medians)
        lines.append(f"{name:<24}{shown}   {_margin(name) or ''}")
    return "\n".join(lines)
