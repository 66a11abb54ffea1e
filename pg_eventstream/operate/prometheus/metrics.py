"""Gauges for Prometheus, read from the database when they are scraped. Needs prometheus-client.

No process has to be alive to report about itself: what a dead leader has left is seen by whatever
reads the database. Counters and histograms, which only the process that counts can know, are in
`instruments`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import django.db
import psycopg
from django.core.exceptions import ImproperlyConfigured
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from ...consumers.progress import ConsumerState
from ...liveness import LATE_SECONDS
from ...postgres.connector import Connector, explain
from ...rarely import Rarely
from ..state import State, read_state
from .latest import Latest

logger = logging.getLogger(__name__)

#: Prometheus waits 10 seconds by default.
_PATIENCE = 5.0
_rarely = Rarely()
_UP = "pg_eventstream_up", "Whether the state of the event stream could be read"

#: The value of a label, if the gauge has one, and the value; None if that is not known.
_Values = Iterable[tuple[str, float | None]]


@dataclass(frozen=True, slots=True)
class Gauge:
    name: str
    text: str
    values: Callable[[State], _Values]
    label: str | None = None

    def family(self, state: State) -> GaugeMetricFamily:
        family = GaugeMetricFamily(self.name, self.text, labels=[self.label] if self.label else [])
        for label, value in self.values(state):
            if value is not None:
                family.add_metric([label] if self.label else [], float(value))
        return family


def _one(name: str, text: str, value: Callable[[State], float | None]) -> Gauge:
    return Gauge(name, text, lambda state: [("", value(state))])


def _by_proxy(name: str, text: str, value: Callable[[Any], float | None]) -> Gauge:
    return Gauge(name, text, lambda state: [(p.name, value(p)) for p in state.proxies], "proxy")


def _by_consumer(name: str, text: str, value: Callable[[ConsumerState], float | None]) -> Gauge:
    return Gauge(
        name, text, lambda state: [(c.name, value(c)) for c in state.consumers], "consumer"
    )


def _by_table(name: str, text: str, value: Callable[[Any], float | None]) -> Gauge:
    return Gauge(name, text, lambda state: [(t.name, value(t)) for t in state.tables], "table")


def _probe(state: State, name: str) -> float | None:
    seconds = (state.doctor or {}).get("seconds")
    value = seconds.get(name) if isinstance(seconds, dict) else None
    return value if isinstance(value, int | float) else None


def is_led(state: State) -> bool:
    """Whether a publisher leads.

    One that is connected through a pooler holds no lock. Its report says that it cannot listen, and
    its heartbeat that it lives.
    """
    if state.leader is not None:
        return True
    silent = state.heartbeat_seconds
    return state.report.get("listens") is False and silent is not None and silent < LATE_SECONDS


def _listens(state: State) -> float | None:
    listens = state.report.get("listens")
    return float(listens) if isinstance(listens, bool) and is_led(state) else None


#: The checks that find a missing or disabled trigger, or functions that are missing.
_TRIGGER_CHECKS = ("pg_eventstream.E020", "pg_eventstream.E021", "pg_eventstream.W020")

GAUGES = [
    _one(
        "pg_eventstream_leader_present",
        "Whether a publisher leads",
        is_led,
    ),
    _one(
        "pg_eventstream_publishers_standing_by",
        "Publishers that stand by to lead",
        lambda s: len(s.standbys),
    ),
    _one(
        "pg_eventstream_heartbeat_age_seconds",
        "Time since the last sign of life of a leader",
        lambda s: s.heartbeat_seconds,
    ),
    _one(
        "pg_eventstream_listen_works",
        "Whether notifications reach the leader; otherwise it polls",
        _listens,
    ),
    _one(
        "pg_eventstream_waiting_events",
        "Committed events that are not in order yet, counted up to 10,000",
        lambda s: s.waiting.count,
    ),
    _one(
        "pg_eventstream_waiting_oldest_seconds",
        "Age of the oldest of these; 0 if there is none",
        lambda s: s.waiting.oldest_seconds or (0 if s.waiting.count == 0 else None),
    ),
    _by_proxy(
        "pg_eventstream_proxy_lag_events",
        "Committed events that the proxy has not taken",
        lambda p: p.lag_events,
    ),
    _by_proxy(
        "pg_eventstream_proxy_lag_seconds",
        "Age of the oldest of these; 0 if there is none",
        lambda p: p.lag_seconds,
    ),
    Gauge(
        "pg_eventstream_proxy_trouble",
        "Whether the leader's last attempt to publish to the proxy has failed",
        lambda s: [(p.name, p.trouble is not None) for p in s.proxies if is_led(s)],
        "proxy",
    ),
    _by_consumer(
        "pg_eventstream_consumer_lag_events",
        "Committed events that the consumer has to handle and has not; far behind, an estimate",
        lambda c: c.lag_events,
    ),
    _by_consumer(
        "pg_eventstream_consumer_lag_seconds",
        "Age of the oldest of these; 0 if there is none",
        lambda c: c.lag_seconds,
    ),
    _by_consumer(
        "pg_eventstream_consumer_processes",
        "Processes that run the consumer",
        lambda c: c.processes,
    ),
    _by_consumer(
        "pg_eventstream_consumer_unheld_slots",
        "Of the 16 slots of the consumer, those that no process has",
        lambda c: len(c.unheld_slots) if c.registered else None,
    ),
    _by_consumer(
        "pg_eventstream_consumer_heartbeat_age_seconds",
        "Longest time without a sign of life from a process that has slots of the consumer",
        lambda c: c.heartbeat_seconds,
    ),
    _by_consumer(
        "pg_eventstream_consumer_paused", "Whether the consumer is paused", lambda c: c.paused
    ),
    _by_consumer(
        "pg_eventstream_consumer_replaying",
        "Whether the consumer handles events again after a reset",
        lambda c: c.replay_to is not None,
    ),
    _by_consumer(
        "pg_eventstream_consumer_declared",
        "Whether the code of the process that is scraped declares the consumer",
        lambda c: c.declared,
    ),
    _by_consumer(
        "pg_eventstream_consumer_failing_slots",
        "Slots that wait before they try an event again",
        lambda c: len(c.failing),
    ),
    _by_consumer(
        "pg_eventstream_consumer_stopped_slots",
        "Slots that have stopped until a person has decided",
        lambda c: len(c.stopped),
    ),
    _by_consumer(
        "pg_eventstream_consumer_parked",
        "Events that are parked, counted up to 10,000",
        lambda c: c.parked,
    ),
    _one(
        "pg_eventstream_pruning_behind_seconds",
        "By how much the oldest event that may be pruned exceeds the retention",
        lambda s: s.pruning.behind_seconds,
    ),
    _one(
        "pg_eventstream_notification_queue_usage_ratio",
        "Share of PostgreSQL's notification queue that is in use",
        lambda s: s.queue_usage,
    ),
    _one(
        "pg_eventstream_oldest_transaction_seconds",
        "Age of the oldest transaction, which prevents vacuum from removing dead rows",
        lambda s: 0 if s.oldest_transaction is None else s.oldest_transaction.seconds,
    ),
    _by_table(
        "pg_eventstream_table_live_rows", "Estimated rows of the table", lambda t: t.live_rows
    ),
    _by_table(
        "pg_eventstream_table_dead_rows",
        "Estimated dead rows of the table, which vacuum has not removed",
        lambda t: t.dead_rows,
    ),
    _by_table(
        "pg_eventstream_table_size_bytes", "Size of the table with its indexes", lambda t: t.bytes
    ),
    _one(
        "pg_eventstream_trigger_ok",
        "Whether the trigger and the functions of the tables are present and enabled",
        lambda s: not any(problem.id in _TRIGGER_CHECKS for problem in s.problems),
    ),
    _one(
        "pg_eventstream_problems",
        "Problems that the checks of the tables have found",
        lambda s: len(s.problems),
    ),
    _one(
        "pg_eventstream_probe_success",
        "Whether the last run of the doctor found nothing wrong",
        lambda s: None if s.doctor is None else bool(s.doctor.get("ok")),
    ),
    _one(
        "pg_eventstream_probe_age_seconds",
        "Time since the last run of the doctor",
        lambda s: s.doctor_seconds,
    ),
    _one(
        "pg_eventstream_probe_received_seconds",
        "Time until a probe of the last run of the doctor was received",
        lambda s: _probe(s, "received"),
    ),
]


class StateCollector(Collector):
    """Yields the gauges. If the database cannot be read, only ``pg_eventstream_up``, which is 0."""

    def __init__(self, state: Latest[State]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        try:
            state = self._state.get(_PATIENCE)
        except CANNOT_READ as e:
            if _rarely():
                logger.warning(
                    "the state for Prometheus cannot be read: %s",
                    reason(e),
                    extra={"event": "state-not-readable"},
                )
            yield GaugeMetricFamily(*_UP, value=0)
            return
        yield GaugeMetricFamily(*_UP, value=1)
        for gauge in GAUGES:
            yield gauge.family(state)


#: What `read_state` raises if the database cannot be read.
CANNOT_READ = (psycopg.Error, django.db.Error, ImproperlyConfigured, TimeoutError)


def reason(error: Exception) -> str:
    """Why the state cannot be read, for a person."""
    return explain(error) if isinstance(error, psycopg.Error) else str(error)


def latest_state(database: str | Connector | None = None) -> Latest[State]:
    """The state of a database, by default of ``EVENTSTREAM_DATABASE``."""
    return Latest(lambda: read_state(database))


def registry(state: Latest[State], *, with_counters: bool) -> CollectorRegistry:
    """The gauges, and with ``with_counters`` also all metrics of this process.

    In prometheus-client's multiprocess mode those of all its processes are included in any case,
    because they are the same wherever they are read.
    """
    result = CollectorRegistry(auto_describe=False)
    result.register(StateCollector(state))
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        MultiProcessCollector(result)  # type: ignore[no-untyped-call]
    elif with_counters:
        result.register(REGISTRY)
    return result


def encode(metrics: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The text for Prometheus in the format of an Accept header, and its content type."""
    encoder, content_type = choose_encoder(accept)
    return encoder(metrics), content_type
