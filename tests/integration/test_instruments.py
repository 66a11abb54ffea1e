"""The publisher's counters and histograms: each event once, and times of one clock each."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import ModuleType

import prometheus_client
import pytest
from django.test import override_settings

from pg_eventstream import instruments, send_event, send_events
from pg_eventstream.limits import Limits
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.publisher.timing import Timing
from pg_eventstream.stream_event import PermissionChange
from tests.support.control_port import ControlPort
from tests.support.database import Database
from tests.support.instrument_values import Increases, value
from tests.support.rounds import publish_once, sequence


def test_observing_all_values_equals_observing_each() -> None:
    values = [0, 0.0005, 0.001, 0.0011, 0.3, 0.5, 2.5, 1800, 1801, 1e9]
    registry = prometheus_client.CollectorRegistry()
    buckets = instruments._SECONDS
    plain = prometheus_client.Histogram("plain", "", ["p"], registry=registry, buckets=buckets)
    ours = instruments._Histogram("ours", "", ["p"], registry=registry, buckets=buckets)
    one, all_ = plain.labels("p"), ours.labels("p")
    for each in values:
        one.observe(each)
    all_.observe_all(values)
    all_.observe_all([])
    samples = [
        [(s.name, s.labels, s.value) for s in histogram._child_samples() if s.name != "_created"]
        for histogram in (one, all_)
    ]
    assert samples[0] == samples[1]


def test_version_of_prometheus_client_with_other_internals_is_observed_one_by_one() -> None:
    registry = prometheus_client.CollectorRegistry()
    histogram = instruments._Histogram("h", "", buckets=(1, 2), registry=registry)
    buckets = histogram.__dict__.pop("_buckets")
    seen: list[float] = []
    histogram.observe = seen.append  # type: ignore[method-assign, assignment]
    histogram.observe_all([3, 1])
    assert seen == [3, 1]
    histogram.__dict__["_buckets"] = buckets


@pytest.fixture
def without_the_extra(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    spec = importlib.util.find_spec("pg_eventstream.instruments")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_the_extra_nothing_is_counted(without_the_extra: ModuleType) -> None:
    assert not without_the_extra.INSTALLED
    before = Increases()
    without_the_extra.recoveries.labels("reset").inc()
    without_the_extra.commit_to_publish_seconds.labels("x").observe_all([1, 2])
    without_the_extra.streams_open.inc()
    without_the_extra.streams_open.dec()
    without_the_extra.count_page(recovering=True, reset=True, missed=True)
    assert before.all() == {}


def test_events_and_batches_are_counted(database: Database, control: ControlPort) -> None:
    before = Increases()
    send_events([("a", "message", n) for n in range(250)])
    publish_once()
    assert before.all() == {
        "sequenced_events_total": 250,
        "published_events_total": 250,
        "batch_events_count": 3,
        "commit_to_sequence_seconds_count": 250,
        "commit_to_publish_seconds_count": 250,
    }


def test_several_proxies_each_count_but_sequencing_is_observed_once(
    database: Database, control: ControlPort
) -> None:
    before = Increases()
    send_event("a", "message", 1)
    with ControlPort() as second, override_settings(GRIP_PROXIES=[{"control_uri": second.url}]):
        publish_once()
    assert before.all() == {
        "sequenced_events_total": 1,
        "published_events_total": 2,
        "batch_events_count": 2,
        "commit_to_sequence_seconds_count": 1,
        "commit_to_publish_seconds_count": 2,
    }
    for port in (control, second):
        assert value("published_events_total", proxy=port.url) == 1


def test_retries_and_refusals_are_counted(database: Database, control: ControlPort) -> None:
    limits = Limits(retry=(0.001, 0.001))
    before = Increases()
    control.answers = [503, 502]
    send_events([("a", "message", n) for n in range(4)])
    Publisher(Connector("default", limits=limits)).run_once()
    assert before.all()["publish_retries_total"] == 2
    assert before.all()["commit_to_publish_seconds_count"] == 4

    control.refused = "events-refused"
    before = Increases()
    send_events([(name, "message", 1) for name in ("a", "refused", "b")])
    with pytest.raises(Exception, match="refused 1 events"):
        Publisher(Connector("default", limits=limits)).run_once()
    counted = before.all()
    assert counted["refused_events_total"] == 1
    assert counted["published_events_total"] == 2
    assert counted["commit_to_publish_seconds_count"] == 2


def seconds(name: str, control: ControlPort) -> float:
    labels = {"proxy": control.url} if name == "commit_to_publish" else {}
    return value(f"{name}_seconds_sum", **labels)


def test_times_are_those_of_the_database_and_of_the_process_but_never_mixed(
    database: Database, control: ControlPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: seconds(name, control) for name in ("commit_to_sequence", "commit_to_publish")}
    send_event("a", "message", 1)
    database.execute(
        "UPDATE pg_eventstream_outbox SET committed_at = committed_at - interval '100 seconds'"
    )
    sequence(database)
    database.execute(
        "UPDATE pg_eventstream_stream SET sequenced_at = sequenced_at - interval '60 seconds'"
    )
    monkeypatch.setattr(time, "time", lambda: 1e9)  # the clock of this machine is wrong
    publish_once()
    assert 40 <= seconds("commit_to_sequence", control) - before["commit_to_sequence"] < 50
    assert 100 <= seconds("commit_to_publish", control) - before["commit_to_publish"] < 110


def test_time_of_sequencing_is_not_negative(database: Database, control: ControlPort) -> None:
    """It is the time at which the sequencing transaction began, perhaps before the commit."""
    before = seconds("commit_to_sequence", control)
    send_event("a", "message", 1)
    sequence(database)
    database.execute(
        "UPDATE pg_eventstream_stream SET committed_at = sequenced_at + interval '1 h'"
    )
    publish_once()
    assert seconds("commit_to_sequence", control) == before


def test_events_of_an_older_trigger_are_counted_without_times(
    database: Database, control: ControlPort
) -> None:
    before = Increases()
    send_events([("a", "message", n) for n in range(3)])
    database.execute("UPDATE pg_eventstream_outbox SET committed_at = NULL WHERE seq % 2 = 0")
    publish_once()
    counted = before.all()
    assert counted["published_events_total"] == 3
    assert counted["commit_to_publish_seconds_count"] in (1, 2)
    assert (
        counted["commit_to_publish_seconds_count"] == (counted["commit_to_sequence_seconds_count"])
    )


@pytest.mark.parametrize(
    ("batches", "observed"),
    [
        ([[1, 2, 3, 4], [5]], [4, 1]),
        # Some were refused.
        ([[1, 3], [4, 5]], [2, 2]),
        ([[2], [5]], [1, 1]),
        ([[2, 4]], [2]),
        # Rows of another stream, whose page was forgotten.
        ([[7, 8], [1]], [0, 0]),
        ([[0], [1, 2, 3, 4, 5]], [0, 5]),
        ([[1, 2, 2, 2, 2, 5], [5]], [3, 0]),
    ],
)
def test_batches_are_parts_of_a_page(batches: list[list[int]], observed: list[int]) -> None:
    name = f"http://{batches}"
    timing = Timing(name, is_first=False)
    timing.note([(None,) * 4 + (n, 1000, 0) for n in range(1, 6)], 5, time.monotonic())
    counts = []
    for batch in batches:
        before = value("commit_to_publish_seconds_count", proxy=name)
        timing.published([PermissionChange(n, "", "") for n in batch])
        counts.append(value("commit_to_publish_seconds_count", proxy=name) - before)
    assert counts == observed
