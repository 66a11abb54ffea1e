"""What a state consists of. What the role may not see is None."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..consumers.progress import ConsumerState

#: Waiting events are counted up to this number.
MOST_COUNTED = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A session of PostgreSQL that belongs to this package."""

    pid: int
    #: ``host:pid`` of the publisher, or the session's application name.
    name: str
    address: str | None
    since: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyState:
    """How far a proxy is. All lags count events that are committed, sequenced or not."""

    name: str
    #: Whether it is in GRIP_URL or GRIP_PROXIES of this process.
    configured: bool
    #: The acknowledged position. None if the publisher does not know the proxy.
    position: int | None
    #: Events that it has not acknowledged, counted up to `MOST_COUNTED` where not sequenced yet.
    lag_events: int | None
    #: The age of the oldest of these, in seconds; 0 if there is none.
    lag_seconds: float | None
    #: Why the publisher's last attempt failed, as the publisher reports it.
    trouble: str | None = None
    #: Whether its control port answered this process. None if it was not asked.
    reachable: bool | None = None
    #: Why it did not, or what it answered.
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Committed events that are not sequenced yet."""

    #: Up to `MOST_COUNTED`. None if that cannot be told (tables of another cluster).
    count: int | None
    oldest_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OldestTransaction:
    """What prevents vacuum from removing dead rows: the oldest snapshot or transaction id."""

    #: "session", "prepared transaction", "replication slot" or "standby".
    kind: str
    #: The pid and application of a session, or the name of the others.
    name: str
    #: How long it is open. None for slots and standbys, of which that is not known.
    seconds: float | None
    #: How many transactions have begun since then.
    transactions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    #: The age of the oldest event that is kept. None if there is none, or it cannot be told.
    oldest_seconds: float | None
    #: EVENTSTREAM_RETENTION; None keeps events of any age.
    retention_seconds: float | None
    #: The time since a pruner has run. None if none ever has.
    ran_seconds: float | None
    #: By how much the oldest event that may be pruned exceeds the retention; 0 if by nothing.
    behind_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    name: str
    bytes: int
    live_rows: int
    dead_rows: int
    last_vacuum: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that a check of the tables has found: see ``checks.tables``."""

    id: str
    message: str
    hint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All times are those of the database server."""

    at: datetime
    alias: str
    #: ``name@host:port``, as in the log.
    database: str
    server_version: str
    is_standby: bool
    #: The server's clock minus that of this process, in seconds.
    clock_seconds: float
    #: Whether LISTEN works on a connection that this process opens (not through some poolers).
    listens: bool
    #: What the checks of tables, migrations, functions and triggers have found.
    problems: list[Problem] = field(default_factory=list)
    #: The tables that this role may not read or that are missing, of those that matter most:
    #: publisher, proxy, outbox; and consumer, if consumers are declared.
    unreadable: list[str] = field(default_factory=list)

    #: The last position of the stream, and the number that its incarnation adds to ids.
    position: int
    incarnation: int
    waiting: Waiting
    #: How many of the newest 1,000 events the trigger did not see. None if that cannot be told.
    unseen: int | None = None

    #: The session that holds the leader's lock.
    leader: Session | None
    standbys: list[Session] = field(default_factory=list)
    #: The name that the leader wrote last, and the seconds since it last did.
    publisher: str | None
    heartbeat_seconds: float | None
    leading_since: datetime | None
    #: What the publisher reports of itself: see `publisher.daemon`.
    report: dict[str, Any] = field(default_factory=dict)
    #: Whether the publisher's role may put events in order. None if it is not known.
    may_sequence: bool | None = None
    #: Other databases of this server on which a publisher runs.
    elsewhere: list[str] = field(default_factory=list)
    #: Whether the publisher is awake and polls: True, False, or None if there is no leader.
    awake: bool | None

    proxies: list[ProxyState] = field(default_factory=list)
    #: How many processes stream without a proxy now.
    hubs: int = 0

    #: By name: those with tables, and those that are declared.
    consumers: list[ConsumerState] = field(default_factory=list)
    #: Why the code that declares consumers cannot be imported here. None if it can.
    consumers_error: str | None = None

    oldest_transaction: OldestTransaction | None = None
    pruning: Pruning
    #: The share of PostgreSQL's notification queue that is in use, 0 to 1.
    queue_usage: float
    tables: list[TableState] = field(default_factory=list)
    #: What the last run of the doctor found, and when. None if it has never run.
    doctor: dict[str, Any] | None = None
    doctor_seconds: float | None = None
