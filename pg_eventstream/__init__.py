"""Transactional, commit-ordered Server-Sent Events for Django on PostgreSQL.

The way of an event:

    send            writes it, with one INSERT in the caller's transaction
    models          the tables; at COMMIT a deferred trigger fills the outbox
    sql/            the functions in the database: enqueue (called by the trigger), sequence
    publisher/      the daemon: puts events in order and publishes them
    grip/           the GRIP protocol, which the proxies speak: Pushpin and Fanout
    streams/        the web process: what a client missed, and streams without a proxy
    endpoint        opens and continues streams; `views` makes Django views of it
    static/         the browser's client
    events          reads events in Python

What these share:

    postgres/       long-lived database sessions, the order of events, LISTEN
    stream_event    a row of the stream, decoded
    sse             the wire format
    channels        what a channel may be called, and whether its events have ids
    users           how users are named in links, at the proxy and in lists of users to skip
    permission      who may read; ends the streams of users who no longer may
    caching, cors   headers of answers
    liveness        warns that no publisher runs
    limits          limits and delays that are no settings
    backoff         how long to wait before the next try
    rarely          limits how often a warning is logged
    errors          what can be raised

For a project:

    conf            the settings
    checks/         validates them, and the tables
    tables/         which databases get the tables
    channelmanager  what a project overrides to decide who reads what
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
    # "import pg_eventstream" and then include(pg_eventstream.urls) is how URLconfs are
    # written; imported lazily, because views need the app registry.
    if name in ("routing", "urls", "views"):
        from importlib import import_module

        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
