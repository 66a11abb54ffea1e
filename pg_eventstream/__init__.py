"""Transactional, commit-ordered Server-Sent Events for Django on PostgreSQL.

The path of an event:

    send            writes it, with one INSERT in the caller's transaction
    models          the tables; at COMMIT a deferred trigger fills the outbox
    sql/            the database functions: enqueue (called by the trigger), sequence
    publisher/      the daemon: puts events in order and publishes them
    grip/           the protocol of the proxies, Pushpin and Fanout
    streams/        the web process: missed events, and streams without a proxy
    endpoint        opens and continues streams; `views` has the Django views
    static/         the browser client
    events          reads events in Python
    consumers/      functions of the project that handle each event once, in order

Shared by these:

    postgres/       long-lived database sessions, the order of events, LISTEN
    stream_event    a row of the stream, decoded
    sse             the wire format
    channels        valid channel names, and whether the events of a channel have ids
    users           the names of users in links, at the proxy and in lists of users to skip
    permission      who may read; ends the streams of users who no longer may
    caching, cors   headers of responses
    liveness        warns if no publisher runs
    limits          limits and delays that are not settings
    backoff         the delay before the next try
    instruments     counters and histograms for Prometheus
    rarely          limits how often a warning is logged
    tracing         the trace in which an event was sent (OpenTelemetry)
    errors          the exceptions
    doctor          the stream of the doctor's probes: its token, and what the endpoint tells
    operate/        shows whether events arrive, and why they do not

For a project:

    conf            the settings
    admin           pages for Django's admin, with `admin_consumers` and `admin_pages`
    checks/         checks the settings and the tables
    tables/         decides which databases get the tables
    channelmanager  the class that a project overrides to decide who reads what
    router          for ``DATABASE_ROUTERS``
    routing         for Channels
    viewsets        the endpoint for Django REST Framework, with its `renderers`
    testing         for a project's tests
    management/     the commands
    templatetags/   ``{% load pg_eventstream %}``
    servers/        PostgreSQL and Pushpin for the demo, the tests and the benchmarks
    demo/           ``python -m pg_eventstream.demo``

A folder's ``__init__.py`` says what it may import.
"""

from __future__ import annotations

from typing import Any

from .errors import (
    EventPermissionError,
    EventsPruned,
    EventStreamError,
    InvalidEvent,
    InvalidRequest,
)
from .events import EventPage, ReceivedEvent, get_current_event_id, get_events, subscribe
from .permission import channel_permission_changed
from .send import NewEvent, asend_event, send_event, send_events

__all__ = [
    "EventPage",
    "EventPermissionError",
    "EventStreamError",
    "EventsPruned",
    "InvalidEvent",
    "InvalidRequest",
    "NewEvent",
    "ReceivedEvent",
    "asend_event",
    "channel_permission_changed",
    "get_current_event_id",
    "get_events",
    "send_event",
    "send_events",
    "subscribe",
]


def __getattr__(name: str) -> Any:
    # URLconfs "import pg_eventstream" and then include(pg_eventstream.urls). These are imported
    # lazily, because views need the app registry.
    if name in ("routing", "urls", "views"):
        from importlib import import_module

        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
