"""Transactional, commit-ordered Server-Sent Events for Django on PostgreSQL.

The way of an event, and the module of each step:

    send        one INSERT, in the caller's transaction
    models      the tables; the deferred trigger that fills the outbox at COMMIT
    sql/        the functions behind it: enqueue (the trigger's), sequence
    doorbell    wakes the publisher: LISTEN, and when to poll instead
    publisher   the daemon: leads, sequences, keeps the feeds and the sweep going
    lead        who leads: one at a time
    once        the same work once: what is there, to every proxy
    locks       the advisory locks: for what there is one at a time
    incarnation whether this is still the stream that we knew
    feed        one proxy's share: reads the stream in order, publishes, acknowledges
    grip        a GRIP proxy: items, batches, the POST to its control port
    sse         the wire format
    users       how users are named in links, at the proxy, and in lists of whom to skip
    permission  who may read it; ends open streams when that changes
    recovery    what a client has missed
    reading     the few threads and connections that read it for clients
    hold        tells the proxy to hold a stream: channels, ids, signed next links
    views       the endpoint
    routing     mounts it in an asgi.py that routes with Channels
    next_links  on the way to it: below a script name, and what else answers in its place
    signature   says why that of a proxy does not verify
    liveness    says that no publisher runs, or that a proxy takes nothing
    rarely      limits how often
    direct      streams from this very process, without a proxy
    shutdown    ends them when their server wants to end
    sockets     what tells that, and whether a client takes what it is sent
    subscription    one reader of channels: what was missed, then what comes
    hub         reads the stream, once for all readers of the process
    limits      refuses a stream that could not resume
    caching     keeps its answers out of caches
    cors        lets pages of other origins read it
    static/     the browser's client
    retention   prunes what is past its day
    unseen      and events that the trigger did not see

Beside it: `listener` is LISTEN, `channelmanager` is what a project overrides to decide who
reads what, `conf` holds the settings, `checks` validates them, `database_checks` looks at the
tables, `errors` is what can be raised, `connection` opens connections that live for long,
`silence` gives up those whose answers are lost. `first_use` says what
the checks find where none are run. `placement` says which database gets the tables,
`router` keeps them out of the others. `unmigrated` makes the tables where migrations are
switched off, `fixtures` says what becomes of rows that ``loaddata`` loads. `viewsets` and
`renderers` are the endpoint for Django REST Framework, `testing` is for the tests of a project,
`importing` moves one from django-eventstream.
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
from .permission import channel_permission_changed
from .recovery import EventPage, ReceivedEvent, get_current_event_id, get_events
from .send import NewEvent, asend_event, send_event, send_events
from .subscription import subscribe

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
