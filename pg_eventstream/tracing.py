"""OpenTelemetry: an event carries the trace in which it was sent. Needs the extra ``[otel]``.

Without the extra, and where no tracer provider is set up, nothing here costs anything.

The publisher is another process than the sender, and reads when the event was committed and put in
order from the tables. So it makes all spans of the event's path, as children of the sender's span.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    trace = None  # type: ignore[assignment]
else:
    _context = TraceContextTextMapPropagator()

#: The name of the instrumentation, as spans show it.
_SCOPE = "pg_eventstream"


def add_trace(meta: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Add the current trace, if there is one, to the meta of an event that is sent.

    The keys are those of the W3C recommendation "Trace Context": ``traceparent`` and
    ``tracestate``. A trace that the meta already contains is left unchanged.
    """
    if trace is None or not trace.get_current_span().get_span_context().is_valid:
        return meta
    if isinstance(meta, Mapping) and "traceparent" in meta:
        return meta
    carrier: dict[str, str] = {}
    _context.inject(carrier)
    if meta is None:
        return carrier
    return {**carrier, **meta} if isinstance(meta, Mapping) else meta
