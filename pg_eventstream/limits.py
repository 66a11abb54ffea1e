"""Limits and delays of database sessions, of the publisher and of the items that it sends.

They are not settings, because projects have no reason to change them. Tests use smaller ones.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """All times are in seconds."""

    # A database session

    #: The maximum for opening a session and preparing it.
    set_up: float = 10.0
    #: The wait for a notification through a pooler, to find out whether LISTEN works.
    probe: float = 2.0
    #: Time without a byte from the server, before it is asked whether it still runs the statement.
    silence: float = 5.0
    #: The interval of looking at the sessions that wait.
    look: float = 1.0

    # The publisher

    #: The first and the longest delay before it connects again.
    reconnect: tuple[float, float] = (0.2, 5.0)
    #: The interval of a standby's attempts to lead.
    standby: float = 0.5
    #: The wait for the leader's lock, which processes of the application hold for a moment.
    in_line: float = 5.0
    heartbeat: float = 10.0
    #: The used share of PostgreSQL's notification queue above which there is a warning.
    queue_usage: float = 0.1
    #: The interval of the pruner, and the one if there were no events for `quiet`.
    prune: float = 30.0
    quiet_prune: float = 600.0
    #: Time after the last event; an unreliable event is due after a minute.
    quiet: float = 90.0
    #: How long a command waits without progress: for a lock that another session holds, for a
    #: server that neither responds nor can be asked why, for a proxy.
    command_patience: float = 15.0
    #: The wait for the batches in flight when the publisher stops.
    join: float = 2.0

    # One proxy's feed

    #: The first and the longest delay before it tries again.
    retry: tuple[float, float] = (0.1, 10.0)
    #: The interval of acknowledgements. After a crash, at most the events of this time are
    #: published again. The proxy drops items that it has seen in the last 60 seconds, and prev-id
    #: stops older ones.
    acknowledge: float = 0.5
    page_bytes: int = 4_000_000
    #: The maximum for connecting to the proxy's control port, and for its response.
    proxy_connect: float = 3.0
    proxy_answer: float = 10.0

    # Consumers

    #: The interval of sharing slots among processes, and of looking for hanging handlers.
    share: float = 0.5
    #: How long progress over events that a consumer does not handle stays unwritten.
    checkpoint: float = 1.0
    #: How often an event is tried again after a serialization failure or a deadlock, before that
    #: counts as an attempt.
    transient: int = 10
    #: The wait for handlers when a process stops; after that, their transactions are rolled back.
    handler: float = 20.0

    # Items

    #: Pushpin refuses a body over 1,000,000 bytes (src/handler/handlerengine.cpp).
    batch_bytes: int = 900_000
    batch_items: int = 100
    #: Clients get a larger event from the endpoint; the proxy gets a hint.
    event_bytes: int = 400_000
    #: This many events of a channel within a second are a burst, which is followed by hints.
    burst: int = 50


#: The limits in production.
LIMITS = Limits()
