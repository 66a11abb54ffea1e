"""The values of this process's counters and histograms."""

from __future__ import annotations

from prometheus_client import REGISTRY


def value(name: str, **labels: str) -> float:
    """The value of one series; 0 if it does not exist yet."""
    return REGISTRY.get_sample_value(f"pg_eventstream_{name}", labels) or 0


class Increases:
    """By how much series have increased since this was made."""

    def __init__(self) -> None:
        self._before = _all_series()

    def all(self) -> dict[str, float]:
        """The series that have changed, without those of buckets and sums."""
        now = _all_series()
        return {
            name: now[name] - self._before.get(name, 0)
            for name in now
            if now[name] != self._before.get(name, 0)
        }


def _all_series() -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name.startswith("pg_eventstream_") and sample.name.endswith(
                ("_total", "_count", "_open")
            ):
                name = sample.name.removeprefix("pg_eventstream_")
                labels = [text for label, text in sample.labels.items() if label != "proxy"]
                key = "/".join([name, *labels])
                found[key] = found.get(key, 0) + sample.value  # of all proxies
    return found
