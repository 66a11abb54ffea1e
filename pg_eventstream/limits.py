"""Limits and delays: of database sessions, of the publisher, of what it sends to a proxy.

They are not settings: a project has no reason to change them. Tests use smaller ones.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """All times are in seconds."""

    # A database session

    #: For opening a session and preparing it.
    set_up: float = 10.0
    #: For a notification through a pooler, to find out whether LISTEN works.
    probe: float = 2.0
    #: Without a byte from the server, before it is asked whether it still works on the statement.
    silence: float = 5.0
    #: Between two looks at the sessions that wait.
    look: float = 1.0

    # The publisher

    #: The first delay before it connects again, and the longest.
    reconnect: tuple[float, float] = (0.2, 5.0)
    #: Between a standby's tries to lead.
    standby: float = 0.5
    #: In line for the lock of the leader, which processes of the application hold for a moment.
    in_line: float = 5.0
    heartbeat: float = 10.0
    #: A share of PostgreSQL's notification queue, from which on there is a warning.
    queue_usage: float = 0.1
    #: Between two runs of the pruner, and when there were no events for `quiet`.
    prune: float = 30.0
    quiet_prune: float = 600.0
    #: After the last event; an unreliable event is due after a minute.
    quiet: float = 90.0
    #: How long a command that is meant to end waits for what does not move: a lock that another
    #: session holds, a server that neither answers nor can be asked why, a proxy.
    command_patience: float = 15.0
    #: For the batches in flight, when it is told to stop.
    join: float = 3.0

    # One proxy's feed

    #: The first delay before it tries again, and the longest.
    retry: tuple[float, float] = (0.1, 10.0)
    #: After a crash at most this much is published again. The proxy drops what it has seen in the
    #: last 60 seconds, and prev-id stops what is older.
    acknowledge: float = 0.5
    page_bytes: int = 4_000_000
    #: For a connection to the proxy's control port, and for its answer.
    proxy_connect: float = 3.0
    proxy_answer: float = 10.0

    # Items

    #: Pushpin refuses a body over 1,000,000 bytes (src/handler/handlerengine.cpp).
    batch_bytes: int = 900_000
    batch_items: int = 100
    #: A larger event reaches clients by way of the endpoint; the proxy gets a hint.
    event_bytes: int = 400_000
    #: So many events of a channel within a second are a burst, which is followed by hints.
    burst: int = 50


#: Of everything that runs in production.
LIMITS = Limits()
