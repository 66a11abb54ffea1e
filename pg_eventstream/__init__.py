"""Transactional, commit-ordered Server-Sent Events for Django on PostgreSQL.

The way of an event:

    send            one INSERT, in the caller's transaction
    models          the tables; a deferred trigger fills the outbox at COMMIT
    sql/            the functions in the database: enqueue (of the trigger), sequence
    publisher/      the daemon: puts events in order and publishes them
    grip/           the GRIP protocol: a proxy's control port, and the instructions to hold a stream
    streams/        the web process: what a client missed, and streams without a proxy
    views           the endpoint
    static/         the browser's client

Below them: `postgres/` opens database sessions that live long. `sse` is the wire format,
`permission` ends streams of users who may no longer read them, `users` names users, `caching` and
`cors` set response headers. `conf` holds the settings, `checks/` validates them, `tables/` decides
which databases get the tables. `liveness` warns that no publisher runs, and `rarely` limits how
often. `errors` lists what can be raised.

For projects: `channelmanager` decides who reads what, `router` and `routing` are for
``DATABASE_ROUTERS`` and for Channels, `viewsets` and `renderers` for Django REST Framework,
`testing` for a project's tests. `management/` holds the commands, and the import from
django-eventstream.
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
