"""The trace of a sender is stored with its events, and continued by the publisher."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.test import override_settings
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer, format_span_id, format_trace_id

from pg_eventstream import (
    asend_event,
    channel_permission_changed,
    get_events,
    send_event,
    send_events,
)
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher
from tests.support.control_port import ControlPort
from tests.support.database import Database


@pytest.fixture
def tracer() -> Iterator[Tracer]:
    provider = TracerProvider()
    yield provider.get_tracer("test")
    provider.shutdown()


def metas(database: Database) -> list[dict[str, Any] | None]:
    rows = database.fetch("SELECT meta FROM pg_eventstream_event ORDER BY id")
    return [meta for (meta,) in rows]


async def asend() -> None:
    await asend_event("c", "t", 1)


def test_every_way_to_send_stores_the_span_in_which_it_was_called(
    database: Database, tracer: Tracer
) -> None:
    with tracer.start_as_current_span("request") as span:
        send_event("c", "t", 1)
        send_events([("c", "t", 1), ("c", "t", 2)])
        async_to_sync(asend)()
    context = span.get_span_context()
    ids = f"{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}"
    parent = f"00-{ids}-{context.trace_flags:02x}"
    assert metas(database) == [{"traceparent": parent}] * 4


def test_meta_of_the_caller_is_kept_and_its_own_trace_too(
    database: Database, tracer: Tracer
) -> None:
    own = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}
    with tracer.start_as_current_span("request"):
        send_event("c", "t", 1, meta={"correlation_id": "7"})
        send_event("c", "t", 1, meta=own)
    first, second = metas(database)
    assert first is not None
    assert first["correlation_id"] == "7"
    assert first.keys() == {"correlation_id", "traceparent"}
    assert second == own


def test_nothing_is_stored_outside_a_trace(database: Database, tracer: Tracer) -> None:
    send_event("c", "t", 1)
    send_events([("c", "t", 1)])
    assert metas(database) == [None, None]


def test_change_of_a_permission_has_no_trace(database: Database, tracer: Tracer) -> None:
    """It is no event, and what it costs must not depend on whether somebody traces."""
    with tracer.start_as_current_span("request"):
        channel_permission_changed(None, "room")
    assert metas(database) == [None]


# The spans of the path


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The spans that this process has recorded, with the SDK set up as a project does."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


def publish_once() -> None:
    Publisher(Connector("default")).run_once()


def test_trace_shows_commit_sequence_and_publish(
    database: Database, control: ControlPort, spans: InMemorySpanExporter
) -> None:
    with trace.get_tracer("test").start_as_current_span("request") as request:
        send_event("orders", "paid", 1)
    before = time.time_ns()
    publish_once()
    context = request.get_span_context()
    found = {span.name: span for span in spans.get_finished_spans() if span.parent}
    assert found.keys() == {"eventstream commit", "eventstream sequence", "eventstream publish"}
    for span in found.values():
        assert span.context.trace_id == context.trace_id
        assert span.parent
        assert span.parent.span_id == context.span_id
        assert span.attributes
        assert span.attributes["messaging.destination.name"] == "orders"
        assert span.attributes["messaging.message.id"] == "orders:1"
    times = [(s.start_time, s.end_time) for s in map(found.__getitem__, STEPS)]
    flat = [at for pair in times for at in pair if at is not None]
    assert flat == sorted(flat)  # each step begins when the one before it has ended
    assert flat[-1] >= before
    assert b"traceparent" not in control.bodies[0]  # it is not for clients


STEPS = ["eventstream commit", "eventstream sequence", "eventstream publish"]


def test_each_proxy_has_its_own_publish_and_the_rest_is_recorded_once(
    database: Database, control: ControlPort, spans: InMemorySpanExporter
) -> None:
    with trace.get_tracer("test").start_as_current_span("request"):
        send_event("orders", "paid", 1)
    with ControlPort() as second:
        with override_settings(GRIP_PROXIES=[{"control_uri": second.url}]):
            publish_once()
        assert control.ids == second.ids == ["1"]
    names = sorted(span.name for span in spans.get_finished_spans() if span.parent)
    assert names == sorted([*STEPS, "eventstream publish"])


@pytest.mark.parametrize(
    "meta",
    [
        None,
        {},
        {"traceparent": "nonsense"},
        {"traceparent": 7},
        {"traceparent": ["00"]},
        {"traceparent": "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "tracestate": "x"},
        {"traceparent": "x" * 100_000, "tracestate": {"a": 1}},
        ["traceparent"],
        "traceparent",
    ],
    ids=lambda meta: str(meta)[:40],
)
def test_event_without_a_valid_trace_is_published_and_makes_no_span(
    database: Database, control: ControlPort, spans: InMemorySpanExporter, meta: Any
) -> None:
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data, meta) VALUES ('a', '1', %s)",
        [None if meta is None else json.dumps(meta)],
    )
    publish_once()
    assert control.ids == ["1"]
    assert spans.get_finished_spans() == ()


def test_recovery_is_a_span(database: Database, spans: InMemorySpanExporter) -> None:
    send_event("orders", "paid", 1)
    database.execute("SELECT pg_eventstream_sequence()")
    get_events(["orders"], "earliest")
    [span] = spans.get_finished_spans()
    assert span.name == "eventstream recover"
    assert span.attributes == {
        "pg_eventstream.channels": 1,
        "pg_eventstream.events": 1,
        "pg_eventstream.reset": 0,
    }
