"""The figures in the documentation are those that were measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks import summary

PAGE = summary.PAGE.read_text(encoding="utf-8")


def test_figures_are_those_of_the_stored_results() -> None:
    assert summary.with_results(PAGE) == PAGE


def test_figure_that_is_not_stored_is_noticed() -> None:
    row = next(line for line in PAGE.splitlines() if "commits/s" in line)
    other = PAGE.replace(row, row.replace("commits/s", "commits/min"))
    assert summary.with_results(other) == PAGE != other


def test_page_has_every_benchmark_once() -> None:
    benchmarks = {
        module.stem
        for module in Path(summary.__file__).parent.glob("*.py")
        if "report.main(" in module.read_text(encoding="utf-8")
    }
    assert sorted(summary.named(PAGE)) == sorted(summary.NAMES) == sorted(benchmarks - {"report"})
