"""OpenTelemetry: an event carries the trace in which it was sent. Needs the extra ``[otel]``.

Without the extra, and where no tracer provider is set up, nothing here costs anything.

The publisher is another process than the sender, and reads when the event was committed and put in
order from the tables. So it makes all spans of the event's path, as children of the sender's span.
A process that runs consumers adds one for each event that it handles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    has_api = False
else:
    has_api = True
    _context = TraceContextTextMapPropagator()

#: Adds attributes to a span.
SetAttributes = Callable[[Mapping[str, Any]], None]
#: The name of the instrumentation, as spans show it.
_SCOPE = "pg_eventstream"


def add_trace(meta: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Add the current trace, if there is one, to the meta of an event that is sent.

    The keys are those of the W3C recommendation "Trace Context": ``traceparent`` and
    ``tracestate``. A trace that the meta already contains is left unchanged.
    """
    if not has_api or not trace.get_current_span().get_span_context().is_valid:
        return meta
    if isinstance(meta, Mapping) and "traceparent" in meta:
        return meta
    carrier: dict[str, str] = {}
    _context.inject(carrier)
    if meta is None:
        return carrier
    return {**carrier, **meta} if isinstance(meta, Mapping) else meta


def is_on() -> bool:
    """Whether this process records spans: the project has set up a tracer provider."""
    if not has_api:
        return False
    provider = trace.get_tracer_provider()
    return not isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider)


def record(
    name: str, carrier: dict[str, str], began: float, ended: float, attributes: Mapping[str, Any]
) -> None:
    """Record a span that is over, as a child of the span that ``carrier`` names.

    ``began`` and ``ended`` are in seconds since 1970. A sender can write any text as its trace; one
    that is not valid is left out.
    """
    parent = _context.extract(carrier)
    if not trace.get_current_span(parent).get_span_context().is_valid:
        return
    span = trace.get_tracer(_SCOPE).start_span(
        f"eventstream {name}",
        context=parent,
        kind=trace.SpanKind.PRODUCER,
        attributes=dict(attributes),
        start_time=round(began * 1e9),
    )
    span.end(round(max(began, ended) * 1e9))


@contextmanager
def span(name: str) -> Iterator[SetAttributes]:
    """Record a span of the block, as a child of the current one."""
    if not has_api:
        yield lambda attributes: None
        return
    with trace.get_tracer(_SCOPE).start_as_current_span(f"eventstream {name}") as current:
        yield current.set_attributes


@contextmanager
def handling(consumer: str, event_id: str, channel: str, meta: Any) -> Iterator[None]:
    """Record a span of the block, in which a consumer handles an event, as a child of the sender's.

    What the block sends continues the trace. An event without a valid trace makes no span. The span
    has no data of the event, and of an error only its type.
    """
    carrier = {
        name: value
        for name in ("traceparent", "tracestate")
        if isinstance(meta, Mapping) and isinstance(value := meta.get(name), str)
    }
    parent = _context.extract(carrier)
    if not trace.get_current_span(parent).get_span_context().is_valid:
        yield
        return
    with trace.get_tracer(_SCOPE).start_as_current_span(
        "eventstream handle",
        context=parent,
        kind=trace.SpanKind.CONSUMER,
        attributes={
            "messaging.system": _SCOPE,
            "messaging.destination.name": channel,
            "messaging.message.id": event_id,
            "pg_eventstream.consumer": consumer,
        },
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield
        except BaseException as e:
            current.set_status(trace.StatusCode.ERROR, type(e).__name__)
            raise
