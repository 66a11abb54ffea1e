"""Judges a state: what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from ..conf import conf
from ..limits import LIMITS
from ..liveness import LATE_SECONDS, START
from ..postgres.connector import plain_sql
from ..postgres.report import own_version
from .consumer_findings import judge_consumers
from .finding import Finding, Level
from .state import OldestTransaction, ProxyState, State

__all__ = [
    "COULD_NOT_LOOK",
    "EXIT_CODES",
    "Finding",
    "Level",
    "Verdict",
    "judge",
    "verdict",
]

Verdict = Literal["healthy", "degraded", "broken"]

#: The exit status of the commands, and the one if the database could not be read.
EXIT_CODES: dict[Verdict, int] = {"healthy": 0, "degraded": 1, "broken": 2}
COULD_NOT_LOOK = 3

# A pruner that has nothing to do runs every 10 minutes.
_PRUNING_LATE_SECONDS = 2 * LIMITS.quiet_prune
# A transaction that holds vacuum back costs something only if there are dead rows.
_MANY_DEAD_ROWS = 10_000
_LONG_SECONDS, _LONG_TRANSACTIONS = 3600.0, 100_000
_CLOCK_SECONDS = 30.0
_QUEUE_NEARLY_FULL = 0.5

# The checks of the tables by their ids.
_PROBLEMS: dict[str, tuple[str, Level]] = {
    "pg_eventstream.I001": ("not-migrated", "broken"),
    "pg_eventstream.W022": ("not-migrated", "broken"),
    "pg_eventstream.E020": ("functions-missing", "broken"),
    "pg_eventstream.E021": ("trigger-broken", "broken"),
    "pg_eventstream.W020": ("replica-role", "degraded"),
}
_SAME_DATABASE = (
    "The first line of its log names the database that it uses. Start it with the same DATABASES"
    " and EVENTSTREAM_DATABASE as the application."
)


def judge(state: State) -> list[Finding]:
    """What is wrong, broken things first. An empty list means that all is well."""
    return sorted(_find(state), key=lambda finding: finding.level != "broken")


def verdict(findings: Iterable[Finding]) -> Verdict:
    levels = {finding.level for finding in findings}
    return "broken" if "broken" in levels else "degraded" if levels else "healthy"


def _find(state: State) -> Iterator[Finding]:
    schema = [*_judge_schema(state)]
    yield from schema
    if any(finding.code == "not-migrated" for finding in schema):
        return
    if state.is_standby:
        yield Finding(
            code="database-is-standby",
            level="broken",
            message=f"The database {state.database} is a standby: nothing can be written there, so"
            " no event can be sent, and the publisher cannot work.",
            remedy="Set HOST and PORT in DATABASES to the primary. With several hosts, list them"
            ' all and set OPTIONS = {"target_session_attrs": "read-write"}.',
        )
        return
    if state.unreadable:
        yield Finding(
            code="role-may-not-read",
            level="degraded",
            message="The role of this connection may not read"
            f" {', '.join(f'pg_eventstream_{table}' for table in state.unreadable)}, so not all"
            " can be seen.",
            remedy=f"Grant it the rights of an observer: {plain_sql()}/grants.sql.",
        )
    if "publisher" not in state.unreadable:
        publisher = [*_judge_publisher(state)]
        yield from publisher
        yield from _judge_events(state, is_alive=_is_alive(state))
        if "proxy" not in state.unreadable:
            for proxy in state.proxies:
                yield from _judge_proxy(state, proxy)
            yield from _judge_settings(state)
    yield from judge_consumers(state)
    yield from _judge_database(state)


def _judge_schema(state: State) -> Iterator[Finding]:
    for problem in state.problems:
        code, level = _PROBLEMS.get(problem.id, ("check-failed", "degraded"))
        yield Finding(
            code=code, level=level, message=problem.message, remedy=problem.hint or problem.id
        )


def _is_alive(state: State) -> bool:
    """Whether a publisher works. Through a pooler, it holds its lock only for moments."""
    beats = state.heartbeat_seconds is not None and state.heartbeat_seconds <= LATE_SECONDS
    return beats and (state.leader is not None or state.report.get("listens") is False)


def _needs_publisher(state: State) -> bool:
    return any(proxy.configured for proxy in state.proxies)


def _judge_publisher(state: State) -> Iterator[Finding]:
    name, seconds = state.publisher, state.heartbeat_seconds or 0
    if state.leader is not None and seconds > LATE_SECONDS:
        yield Finding(
            code="publisher-silent",
            level="broken",
            message=f"The publisher {name} leads, but has shown no sign of life for"
            f" {seconds:.0f} seconds: its process is suspended, or its machine hangs. No other can"
            " take over while its session is open.",
            remedy="Continue or restart it. If that is not possible, end its session, and a"
            f" standby takes over: SELECT pg_terminate_backend({state.leader.pid});",
        )
    elif not _is_alive(state) and not _is_taking_over(state) and _needs_publisher(state):
        yield _find_missing_publisher(state)
    if state.may_sequence is False:
        role = state.report.get("role")
        yield Finding(
            code="publisher-may-not-sequence",
            level="broken",
            message=f"The publisher's role {role} may not call pg_eventstream_sequence(), so no"
            " event is put in order.",
            remedy=f"Grant it the rights of a publisher: {plain_sql()}/grants.sql, or only GRANT"
            f" EXECUTE ON FUNCTION pg_eventstream_sequence() TO {role};",
        )
    if _is_alive(state) and state.report.get("listens") is False:
        yield Finding(
            code="publisher-without-listen",
            level="degraded",
            message=f"LISTEN does not work on the connection of the publisher {name}, so it polls"
            " ten times a second, and two publishers can lead at once: there is a pooler in"
            " transaction mode (PgBouncer).",
            remedy="Give the publisher a direct connection, by --database or --dsn.",
        )


def _is_taking_over(state: State) -> bool:
    """Whether the leader has just gone, and a standby is about to notice."""
    beats = state.heartbeat_seconds is not None and state.heartbeat_seconds <= LATE_SECONDS
    return beats and bool(state.standbys)


def _find_missing_publisher(state: State) -> Finding:
    if state.elsewhere:
        others = " and ".join(repr(name) for name in state.elsewhere)
        return Finding(
            code="publisher-elsewhere",
            level="broken",
            message=f"No publisher runs on the database {state.database}, so no event reaches the"
            f" proxies. One runs on {others} of the same server.",
            remedy=f"If that one is meant for this application: {_SAME_DATABASE} If it is not:"
            f" {START}.",
        )
    if state.publisher is None:
        return Finding(
            code="no-publisher",
            level="broken",
            message=f"No publisher has ever run on the database {state.database}, so no event"
            " reaches the proxies.",
            remedy=f"{START}. If one runs, it uses another database. {_SAME_DATABASE}",
        )
    return Finding(
        code="publisher-gone",
        level="broken",
        message=f"The publisher {state.publisher} has ended, at most"
        f" {state.heartbeat_seconds or 0:.0f} seconds ago, and no other has taken over, so no event"
        " reaches the proxies.",
        remedy=f"{START}. Its log says why it ended.",
    )


def _judge_events(state: State, *, is_alive: bool) -> Iterator[Finding]:
    seconds, count = state.waiting.oldest_seconds or 0, state.waiting.count or 0
    runs_consumers = any(consumer.processes for consumer in state.consumers)
    others = "processes stream without a proxy" if state.hubs else "processes run consumers"
    if (
        count
        and seconds > LATE_SECONDS
        and (is_alive or state.hubs or runs_consumers)
        and state.may_sequence is not False
    ):
        yield Finding(
            code="events-wait",
            level="broken",
            message=f"{count} committed events wait to be put in order, the oldest for"
            f" {seconds:.0f} seconds, although"
            f" {'a publisher leads' if is_alive else others}.",
            remedy="The publisher's log says why. If it waits for a lock, this shows for whom:"
            " SELECT pid, pg_blocking_pids(pid), query FROM pg_stat_activity;"
            if is_alive
            else "Start a publisher, or grant the role of these processes the rights of a"
            f" sequencer: {plain_sql()}/grants.sql.",
        )
    if state.unseen:
        yield Finding(
            code="unseen-events",
            level="degraded",
            message=f"{state.unseen} of the newest events have no place in the order, because the"
            " trigger did not see them. They are never delivered.",
            remedy="They were inserted while the trigger was disabled or with"
            " session_replication_role = replica. This counts all of them, and says how to send"
            f" them again: python manage.py check --database {state.alias}",
        )


def _judge_proxy(state: State, proxy: ProxyState) -> Iterator[Finding]:
    is_alive, lag = _is_alive(state), proxy.lag_seconds or 0
    if not proxy.configured:
        return
    waiting = f"{proxy.lag_events or 0} events wait for it"
    if is_alive and proxy.position is None:
        served = ", ".join(state.report.get("proxies") or ()) or "no proxy"
        yield Finding(
            code="proxy-not-served",
            level="broken",
            message=f"The publisher {state.publisher} sends nothing to the proxy {proxy.name}. It"
            f" serves {served}.",
            remedy="Start it with the same GRIP_URL (or GRIP_PROXIES) as this process.",
        )
    elif proxy.trouble and is_alive:
        yield Finding(
            code="proxy-unreachable",
            level="broken",
            message=f"The proxy {proxy.name} takes no events from the publisher: {proxy.trouble};"
            f" {waiting}.",
            remedy="Start the proxy, or correct its address and key in GRIP_URL. The events are"
            " sent when it takes them again.",
        )
    elif proxy.reachable is False:
        yield Finding(
            code="proxy-unreachable",
            level="degraded",
            message=f"The proxy {proxy.name} takes no events from this process: {proxy.answer}.",
            remedy="Start the proxy, or correct its address and key in GRIP_URL. If only the"
            " machine of the publisher can reach it, run this command there.",
        )
    elif is_alive and lag > LATE_SECONDS and (state.waiting.oldest_seconds or 0) < LATE_SECONDS:
        yield Finding(
            code="proxy-late",
            level="broken",
            message=f"{waiting[:1].upper()}{waiting[1:]}: the proxy {proxy.name}, since"
            f" {lag:.0f} seconds.",
            remedy=f"The log of the publisher {state.publisher} says why it does not take them.",
        )


def _judge_settings(state: State) -> Iterator[Finding]:
    if not _is_alive(state):
        return
    theirs, ours = state.report.get("grip_prefix"), conf.grip_prefix
    if theirs is not None and theirs != ours and _needs_publisher(state):
        yield Finding(
            code="prefix-differs",
            level="broken",
            message=f"GRIP_PREFIX is {ours!r} here and {theirs!r} in the publisher, so the proxy"
            " gets the events on channels that no stream is subscribed to.",
            remedy="Start the publisher and the application with the same GRIP_PREFIX.",
        )
    served = state.report.get("proxies")
    if served and not _needs_publisher(state):
        yield Finding(
            code="proxy-not-configured",
            level="degraded",
            message=f"The publisher serves {', '.join(served)}, and this process has no proxy, so"
            " it does not recognize the proxy's requests.",
            remedy="Start the application with the same GRIP_URL (or GRIP_PROXIES) as the"
            " publisher.",
        )
    version = state.report.get("version")
    if version and version != own_version() and "unknown" not in (version, own_version()):
        yield Finding(
            code="versions-differ",
            level="degraded",
            message=f"The publisher runs version {version}, and this process {own_version()}.",
            remedy="Install the same version on both, and restart the publisher. The upgrade notes"
            " say in which order.",
        )


def _judge_database(state: State) -> Iterator[Finding]:
    if state.queue_usage > LIMITS.queue_usage:
        yield Finding(
            code="queue-fills",
            level="broken" if state.queue_usage >= _QUEUE_NEARLY_FULL else "degraded",
            message=f"PostgreSQL's notification queue is {state.queue_usage:.0%} full. When it is"
            " full, transactions that notify fail at COMMIT: no event can be sent.",
            remedy="A session has used LISTEN and then stayed in a transaction. Find it, and end"
            " it: SELECT pid, xact_start, query FROM pg_stat_activity WHERE xact_start IS NOT NULL"
            " ORDER BY xact_start;",
        )
    pruning = state.pruning
    if pruning.behind_seconds > _PRUNING_LATE_SECONDS:
        ran = pruning.ran_seconds
        never = "has never run" if ran is None else f"ran {ran / 60:.0f} minutes ago"
        yield Finding(
            code="pruning-behind",
            level="degraded",
            message="The oldest event should have been pruned"
            f" {pruning.behind_seconds / 60:.0f} minutes ago. The pruner {never}.",
            remedy="A publisher prunes while it leads; its log says if it cannot. Without a"
            " publisher, let cron run: python manage.py eventstream_prune",
        )
    dead = sum(table.dead_rows for table in state.tables)
    oldest = state.oldest_transaction
    if oldest is not None and dead >= _MANY_DEAD_ROWS and _is_long(oldest):
        yield Finding(
            code="vacuum-held-back",
            level="degraded",
            message=f"The {oldest.kind} {oldest.name} prevents vacuum from removing {dead:,} dead"
            " rows of the tables of events"
            f"{'' if oldest.seconds is None else f', for {oldest.seconds / 60:.0f} minutes'}. The"
            " tables grow, and everything becomes slower.",
            remedy=_release(oldest),
        )
    if abs(state.clock_seconds) > _CLOCK_SECONDS:
        yield Finding(
            code="clocks-differ",
            level="degraded",
            message="The clock of the database server differs from the one of this machine by"
            f" {state.clock_seconds:+.0f} seconds. Signed links and tokens can be refused as"
            " expired.",
            remedy="Synchronize the clocks of all machines (NTP).",
        )


def _is_long(oldest: OldestTransaction) -> bool:
    return (oldest.seconds or 0) >= _LONG_SECONDS or oldest.transactions >= _LONG_TRANSACTIONS


def _release(oldest: OldestTransaction) -> str:
    if oldest.kind == "session":
        return f"End it: SELECT pg_terminate_backend({oldest.name.split()[0]});"
    if oldest.kind == "prepared transaction":
        return f"Commit it, or roll it back: ROLLBACK PREPARED {_literal(oldest.name)};"
    if oldest.kind == "replication slot":
        return (
            "Start the standby that uses it. If that is gone for good:"
            f" SELECT pg_drop_replication_slot({_literal(oldest.name)});"
        )
    return "End the long query on this standby, or set hot_standby_feedback = off there."


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
