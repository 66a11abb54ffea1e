"""Shows a state on one screen of 80 columns, what is wrong first. It is readable without colour."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime

from ..consumers.progress import ConsumerState
from ..postgres.report import own_version
from .ages import age
from .findings import Finding, verdict
from .state import MOST_COUNTED, ProxyState, State

WIDTH = 80
#: Colours a text: the kind is "broken", "degraded", "healthy" or "label".
Paint = Callable[[str, str], str]
_INDENT = 12


def plain(kind: str, text: str) -> str:
    """The text without colour."""
    return text


def render(state: State, findings: Sequence[Finding], paint: Paint = plain) -> str:
    """The whole screen, as lines of at most 80 columns where words allow it."""
    return "\n".join(_lines(state, findings, paint))


def _lines(state: State, findings: Sequence[Finding], paint: Paint) -> Iterator[str]:
    found = verdict(findings)
    title = f"pg_eventstream {own_version()}: "
    at = f"{state.at:%Y-%m-%d %H:%M:%S} UTC"
    space = " " * max(1, WIDTH - len(title) - len(found) - len(at))
    yield f"{title}{paint(found, found.upper())}{space}{at}"
    yield ""
    yield from render_findings(findings, paint)
    for label, texts in _sections(state):
        yield from _section(label, texts, paint)


def render_findings(findings: Iterable[Finding], paint: Paint = plain) -> Iterator[str]:
    """Lines that say what is wrong and what to do."""
    for finding in findings:
        yield paint(finding.level, f"{finding.level.upper()}: {finding.code}")
        yield from wrap(finding.message, "  ")
        yield from wrap(f"To do: {finding.remedy}", "  ")
        yield ""


def wrap(text: str, indent: str, first: str | None = None) -> Iterator[str]:
    """Lines of at most `WIDTH` columns, where words allow it."""
    for line in text.split("\n"):
        yield from textwrap.wrap(
            printable(line),
            WIDTH,
            initial_indent=indent if first is None else first,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
        first = None


def printable(text: str) -> str:
    """Names in the database and answers of proxies must not control the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _section(label: str, texts: Iterable[str], paint: Paint) -> Iterator[str]:
    first = label.ljust(_INDENT)
    for text in texts:
        for line in wrap(text, " " * _INDENT, first):
            yield paint("label", first) + line[_INDENT:] if first.strip() else line
            first = " " * _INDENT


def _sections(state: State) -> Iterator[tuple[str, Iterator[str]]]:
    yield "Database", _database(state)
    yield "Publisher", _publisher(state)
    yield "Events", _events(state)
    if state.proxies:
        yield "Proxies", (_proxy(proxy) for proxy in state.proxies)
    if state.hubs or not state.proxies:
        yield "Streams", iter([f"processes that stream without a proxy now: {state.hubs}"])
    if state.consumers:
        yield "Consumers", (_consumer(consumer) for consumer in state.consumers)
    yield "Pruning", _pruning(state)
    yield "Vacuum", _vacuum(state)
    yield "Tables", _tables(state)
    yield "Doctor", _doctor(state)


def _database(state: State) -> Iterator[str]:
    yield f"{state.database}, PostgreSQL {state.server_version}"
    if state.is_standby:
        yield "a standby, which cannot be written to"
    elif not state.problems:
        yield "migrations applied, functions in place, trigger enabled"
    for problem in state.problems:
        yield f"{problem.id}: see above"
    listen = "LISTEN works" if state.listens else "LISTEN does not work on this connection"
    yield f"{listen}; notification queue {state.queue_usage:.0%} full"


def _publisher(state: State) -> Iterator[str]:
    if "publisher" in state.unreadable:
        yield "cannot be seen by this role"
        return
    leader = state.leader
    if leader is not None:
        at = f" at {leader.address}" if leader.address else ""
        since = f" since {_at(state.leading_since)}" if state.leading_since else ""
        yield f"{leader.name} leads{since} (session {leader.pid}{at})"
    elif state.publisher is None:
        yield "none has ever run"
    else:
        yield f"{state.publisher} led last; no session holds the lead now"
    if state.heartbeat_seconds is not None:
        details = [f"heartbeat {age(state.heartbeat_seconds)} ago"]
        if state.awake is not None:
            details.append("awake, it polls" if state.awake else "asleep, the doorbell wakes it")
        if "listens" in state.report:
            details.append("LISTEN works" if state.report["listens"] else "LISTEN does not work")
        if version := state.report.get("version"):
            details.append(f"version {version}")
        yield "; ".join(details)
    if state.standbys:
        places = ", ".join(
            f"session {one.pid}" + (f" at {one.address}" if one.address else "")
            for one in state.standbys
        )
        yield f"standing by: {places}"
    elif leader is not None:
        yield "standing by: none"


def _events(state: State) -> Iterator[str]:
    incarnation = f" (incarnation {state.incarnation})" if state.incarnation else ""
    yield f"{state.position:,} put in order so far{incarnation}"
    count = state.waiting.count
    if count is None:
        yield "waiting to be put in order: cannot be told"
    elif count:
        oldest = age(state.waiting.oldest_seconds or 0)
        yield f"waiting to be put in order: {_count(count)}, the oldest for {oldest}"
    else:
        yield "waiting to be put in order: none"
    if state.unseen:
        yield f"{state.unseen} of the newest 1,000 were not seen by the trigger"


def _proxy(proxy: ProxyState) -> str:
    parts = []
    if proxy.reachable is not None:
        parts.append("answers" if proxy.reachable else f"does not answer ({proxy.answer})")
    if proxy.position is None:
        parts.append("not served by the publisher")
    else:
        parts.append(f"has acknowledged {proxy.position:,}")
        if proxy.lag_events:
            parts.append(f"{_count(proxy.lag_events)} behind, {age(proxy.lag_seconds or 0)}")
        else:
            parts.append("nothing behind")
    if proxy.trouble:
        parts.append(f"the publisher says: {proxy.trouble}")
    if not proxy.configured:
        parts.append("not configured in this process")
    return f"{proxy.name}: {'; '.join(parts)}"


def _consumer(consumer: ConsumerState) -> str:
    parts = []
    if consumer.declared is False:
        parts.append("not declared here")
    if not consumer.registered:
        parts.append("has never run")
    elif consumer.processes:
        beat = consumer.heartbeat_seconds
        heartbeat = "" if beat is None else f", heartbeat {age(beat)} ago"
        parts.append(f"run by {consumer.processes}{heartbeat}")
    else:
        parts.append("not running")
    if consumer.paused:
        parts.append("paused")
    if consumer.lag_events:
        about = "about " if consumer.lag_is_estimate else ""
        since = "" if consumer.lag_seconds is None else f", {age(consumer.lag_seconds)}"
        parts.append(f"{about}{consumer.lag_events:,} behind{since}")
    elif consumer.lag_events == 0:
        parts.append("nothing behind")
    if consumer.replay_to is not None:
        parts.append(f"handles again up to {consumer.replay_to:,}")
    if consumer.failing:
        parts.append(f"slots that retry: {len(consumer.failing)}")
    if consumer.stopped:
        parts.append(f"slots that have stopped: {len(consumer.stopped)}")
    if consumer.parked:
        parts.append(f"parked: {_count(consumer.parked)}")
    return f"{consumer.name}: {'; '.join(parts)}"


def _pruning(state: State) -> Iterator[str]:
    pruning = state.pruning
    if pruning.retention_seconds is None:
        kept = "events of any age are kept"
    else:
        kept = f"events are kept for {age(pruning.retention_seconds)}"
    if pruning.oldest_seconds is not None:
        kept += f"; the oldest is {age(pruning.oldest_seconds)} old"
    yield kept
    ran = pruning.ran_seconds
    late = f", {age(pruning.behind_seconds)} behind" if pruning.behind_seconds >= 1 else ""
    yield ("never pruned" if ran is None else f"last pruned {age(ran)} ago") + late


def _vacuum(state: State) -> Iterator[str]:
    oldest = state.oldest_transaction
    if oldest is None:
        yield "nothing holds it back"
        return
    since = "" if oldest.seconds is None else f", {age(oldest.seconds)} old"
    yield (
        f"held back the most by {oldest.kind} {oldest.name}{since},"
        f" {oldest.transactions:,} transactions"
    )


def _tables(state: State) -> Iterator[str]:
    for table in state.tables:
        name = table.name.removeprefix("pg_eventstream_")
        vacuumed = f"vacuumed {_at(table.last_vacuum)}" if table.last_vacuum else ""
        yield (
            f"{name:10}{_bytes(table.bytes):>9}{table.live_rows:>13,} rows"
            f"{table.dead_rows:>11,} dead  {vacuumed}"
        )


def _doctor(state: State) -> Iterator[str]:
    if state.doctor is None or state.doctor_seconds is None:
        yield "has never run: python manage.py eventstream_doctor"
        return
    found = state.doctor.get("findings")
    codes = ", ".join(map(str, found)) if isinstance(found, list) and found else "nothing wrong"
    yield f"{age(state.doctor_seconds)} ago: {codes}"


def _count(number: int) -> str:
    return f"{'at least ' if number >= MOST_COUNTED else ''}{number:,}"


def _at(time: datetime | None) -> str:
    return "" if time is None else f"{time:%Y-%m-%d %H:%M}"


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
