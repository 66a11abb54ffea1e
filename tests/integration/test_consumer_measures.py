"""What a process that runs consumers counts and measures, and the spans that it records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pg_eventstream import instruments, send_event, send_events
from pg_eventstream.consumers import ConsumedEvent, Retry, consumer
from pg_eventstream.consumers.declare import Consumer
from pg_eventstream.consumers.measures import Measures
from pg_eventstream.consumers.worker import Worker
from tests.support.database import Database
from tests.support.handlers import named, obey
from tests.support.instrument_values import Increases, value

SEQUENCE = "SELECT pg_eventstream_sequence()"


def do_nothing(event: ConsumedEvent, name: str) -> None:
    pass


def run_once(made: Consumer) -> int:
    return Worker([made], "default").run_once()


@pytest.mark.parametrize("batch", [1, 10])
def test_each_event_is_counted_and_measured_once(database: Database, batch: int) -> None:
    name = f"counted {batch}"
    made = consumer(name, start="earliest", batch=batch)(named(do_nothing, name))
    send_events([("a", "message", n) for n in range(250)])
    database.execute("UPDATE pg_eventstream_outbox SET committed_at = NULL WHERE seq % 50 = 0")
    before = Increases()
    assert run_once(made) == 250
    found = before.all()
    found.pop("sequenced_events_total")
    assert found == {
        f"consumer_handled_events_total/{name}": 250,
        f"consumer_handler_seconds_count/{name}": 250,
        # An older trigger does not say when an event was committed.
        f"consumer_commit_to_handled_seconds_count/{name}": 245,
    }


def test_failures_and_parked_events_are_counted(database: Database) -> None:
    made = consumer("fails", start="earliest", retry=Retry(3, backoff=0))(
        named(do_as_told, "fails")
    )
    send_event("a", "message", "fail")
    send_event("a", "message", "go")
    before = Increases()
    assert run_once(made) == 1
    found = before.all()
    assert found["consumer_failed_attempts_total/fails"] == 3
    assert found["consumer_parked_events_total/fails"] == 1
    assert found["consumer_handled_events_total/fails"] == 1
    assert found["consumer_handler_seconds_count/fails"] == 4
    assert found["consumer_commit_to_handled_seconds_count/fails"] == 1


def do_as_told(event: ConsumedEvent, name: str) -> None:
    if event.json() == "fail":
        raise ValueError


def test_age_of_a_handled_event_is_by_the_clock_of_the_database(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = consumer("aged", start="earliest")(named(do_nothing, "aged"))
    send_event("a", "message", 1)
    database.execute("UPDATE pg_eventstream_outbox SET committed_at = now() - interval '100 s'")
    database.execute(SEQUENCE)
    monkeypatch.setattr(time, "time", lambda: 1e9)  # the clock of this machine is wrong
    run_once(made)
    assert 100 <= value("consumer_commit_to_handled_seconds_sum", consumer="aged") < 130


def test_without_the_extra_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "INSTALLED", False)
    measures = Measures("nothing")
    measures.called([1.0])
    measures.handled([])
    measures.flush()
    assert (measures._calls, measures._ages, measures._count) == ([], [], 0)


# Spans


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The spans that this process has recorded, with the SDK set up as a project does."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


def handled(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == "eventstream handle"]


def test_handling_is_a_child_of_the_senders_span_and_what_it_sends_continues_the_trace(
    database: Database, spans: InMemorySpanExporter
) -> None:
    def ship(event: ConsumedEvent) -> None:
        send_event("shipments", "shipped", "secret")

    made = consumer("ship", channels=["orders"], start="earliest")(ship)
    send_event("orders", "placed", "secret")  # outside a trace
    with trace.get_tracer("test").start_as_current_span("request") as request:
        send_event("orders", "placed", "secret")
    assert made.drain() == 2
    (span,) = handled(spans)
    context = request.get_span_context()
    assert span.parent is not None
    assert (span.context.trace_id, span.parent.span_id) == (context.trace_id, context.span_id)
    assert span.attributes == {
        "messaging.system": "pg_eventstream",
        "messaging.destination.name": "orders",
        "messaging.message.id": "orders:2",
        "pg_eventstream.consumer": "ship",
    }
    metas = database.fetch(
        "SELECT meta ->> 'traceparent' FROM pg_eventstream_event WHERE channel = 'shipments'"
        " ORDER BY id"
    )
    assert metas[0] == (None,)
    assert f"{span.context.trace_id:032x}-{span.context.span_id:016x}" in metas[1][0]


def test_span_of_an_event_that_fails_has_the_type_of_the_error_and_no_data(
    database: Database, spans: InMemorySpanExporter
) -> None:
    made = consumer("fails", start="earliest", retry=Retry(1))(named(obey, "fails"))
    with trace.get_tracer("test").start_as_current_span("request"):
        send_event("a", "message", {"fail": "secret"})
    run_once(made)
    (span,) = handled(spans)
    assert (span.status.status_code, span.status.description) == (
        trace.StatusCode.ERROR,
        "ValueError",
    )
    assert "secret" not in span.to_json()


@pytest.mark.parametrize("meta", [{"traceparent": "nonsense"}, {"traceparent": 7}, ["traceparent"]])
def test_event_without_a_valid_trace_is_handled_without_a_span(
    database: Database, spans: InMemorySpanExporter, meta: Any
) -> None:
    made = consumer("plain", start="earliest")(named(do_nothing, "plain"))
    send_event("a", "message", 1, meta=meta if isinstance(meta, dict) else None)
    assert made.drain() == 1
    assert handled(spans) == []
