"""Counters and histograms for Prometheus, in the default registry of prometheus-client.

They count what happens in this process. Without prometheus-client (the extra ``metrics``), they do
nothing. What can be read from the database is not counted here: see `operate.prometheus.metrics`.

No label contains a channel or a user, so their number stays small. In prometheus-client's
multiprocess mode (``PROMETHEUS_MULTIPROC_DIR``), they are summed over all processes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Protocol

try:
    import prometheus_client
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True

#: Latencies are from a millisecond to those of an outage.
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0),
)
_BATCH = (1, 2, 5, 10, 20, 50, 100)


class Counted(Protocol):
    """A number that increases."""

    def labels(self, *values: Any) -> Counted: ...
    def inc(self, amount: float = 1) -> None: ...


class Level(Protocol):
    """A number that increases and decreases."""

    def inc(self, amount: float = 1) -> None: ...
    def dec(self, amount: float = 1) -> None: ...


class Distribution(Protocol):
    """The distribution of observed values."""

    def labels(self, *values: Any) -> Distribution: ...
    def observe_all(self, values: Sequence[float]) -> None: ...


class _Nothing:
    """Any of these without prometheus-client."""

    def labels(self, *values: Any) -> _Nothing:
        return self

    def inc(self, amount: float = 1) -> None:
        pass

    def dec(self, amount: float = 1) -> None:
        pass

    def observe_all(self, values: Sequence[float]) -> None:
        pass


if INSTALLED:

    class _Histogram(prometheus_client.Histogram):
        def observe_all(self, values: Sequence[float]) -> None:
            """Like `observe` for each value.

            It updates each bucket once. `observe` costs a microsecond per value, and several in
            multiprocess mode, which would be as much as all other work for an event.
            """
            if not all(map(self.__dict__.__contains__, ("_upper_bounds", "_buckets", "_sum"))):
                for value in values:  # a version of prometheus-client that is not known yet
                    self.observe(value)
                return
            counts = [0] * len(self._upper_bounds)
            for value in values:
                counts[bisect_left(self._upper_bounds, value)] += 1
            for bucket, count in zip(self._buckets, counts, strict=True):
                if count:
                    bucket.inc(count)
            self._sum.inc(sum(values))


def _counter(name: str, text: str, *labels: str) -> Counted:
    return prometheus_client.Counter(name, text, labels) if INSTALLED else _Nothing()


def _histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Distribution:
    return _Histogram(name, text, labels, buckets=buckets) if INSTALLED else _Nothing()


def _gauge(name: str, text: str) -> Level:
    if not INSTALLED:
        return _Nothing()
    return prometheus_client.Gauge(name, text, multiprocess_mode="livesum")


# The publisher

sequenced_events = _counter(
    "pg_eventstream_sequenced_events_total", "Events that this process has put in order"
)
published_events = _counter(
    "pg_eventstream_published_events_total", "Events that the proxy has taken", "proxy"
)
publish_retries = _counter(
    "pg_eventstream_publish_retries_total",
    "Attempts to publish that failed and were repeated",
    "proxy",
)
refused_events = _counter(
    "pg_eventstream_refused_events_total",
    "Events that the proxy has refused, together with the hints that replaced them",
    "proxy",
)
batch_events = _histogram(
    "pg_eventstream_batch_events", "Events in a request to a proxy", _BATCH, "proxy"
)
commit_to_sequence_seconds = _histogram(
    "pg_eventstream_commit_to_sequence_seconds",
    "Time from the commit of an event until it was put in order",
    _SECONDS,
)
commit_to_publish_seconds = _histogram(
    "pg_eventstream_commit_to_publish_seconds",
    "Time from the commit of an event until the proxy has taken it",
    _SECONDS,
    "proxy",
)

# Consumers

handled_events = _counter(
    "pg_eventstream_consumer_handled_events_total",
    "Events that this process has handled",
    "consumer",
)
failed_attempts = _counter(
    "pg_eventstream_consumer_failed_attempts_total",
    "Attempts to handle an event that failed",
    "consumer",
)
parked_events = _counter(
    "pg_eventstream_consumer_parked_events_total", "Events that were parked", "consumer"
)
handler_seconds = _histogram(
    "pg_eventstream_consumer_handler_seconds",
    "Time that the function took for an event, whether or not it failed",
    _SECONDS,
    "consumer",
)
commit_to_handled_seconds = _histogram(
    "pg_eventstream_consumer_commit_to_handled_seconds",
    "Time from the commit of an event until the transaction that handled it was committed",
    _SECONDS,
    "consumer",
)

# The application

recoveries = _counter(
    "pg_eventstream_recoveries_total", "Streams that clients opened with an id", "outcome"
)
resets = _counter("pg_eventstream_resets_total", "stream-reset events sent to clients")
revocations = _counter(
    "pg_eventstream_revocations_total", "Open streams that ended because their user may not read"
)
hub_pages = _counter(
    "pg_eventstream_hub_pages_total", "Pages of the stream read for clients without a proxy"
)
streams_open = _gauge("pg_eventstream_streams_open", "Open streams to clients without a proxy")

#: A series that begins with 0 shows its first increase.
for _outcome in ("resumed", "nothing_missed", "reset", "refused"):
    recoveries.labels(_outcome)


def count_page(*, recovering: bool, reset: bool, missed: bool) -> None:
    """Count the first page of a stream. ``recovering``: the client had an id."""
    if recovering:
        outcome = "reset" if reset else "resumed" if missed else "nothing_missed"
        recoveries.labels(outcome).inc()
    if reset:
        resets.inc()
