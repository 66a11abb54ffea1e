"""The trace of a sender is stored with its events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Tracer, format_span_id, format_trace_id

from pg_eventstream import asend_event, channel_permission_changed, send_event, send_events
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
