"""Shows consumers and their parked events in 80 columns. It is readable without colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..consumers.progress import MOST_COUNTED, ConsumerState, TroubledSlot
from ..consumers.trouble import Parked
from ..postgres.slots import SLOTS
from .ages import age
from .screen import Paint, plain, printable, wrap

_INDENT = "    "
#: So many slots of a consumer are shown.
_MOST_TROUBLED = 5
_KINDS = ["healthy", "degraded", "broken"]


def render_consumers(consumers: Sequence[ConsumerState], paint: Paint = plain) -> str:
    """All consumers: what each does, and what is wrong."""
    if not consumers:
        return (
            "There are no consumers. Declare one with @consumer in the module event_consumers of an"
            " installed app."
        )
    return "\n".join(line for one in consumers for line in _consumer(one, paint))


def _consumer(one: ConsumerState, paint: Paint) -> Iterator[str]:
    kind, words = describe(one)
    yield f"{paint('label', printable(one.name))}  {paint(kind, words)}"
    for text in details(one):
        yield from wrap(text, _INDENT + "  ", _INDENT)


def describe(one: ConsumerState) -> tuple[str, str]:
    """How bad it is, and what it does now, in a few words."""
    if one.renamed_to is not None:
        return "broken", f"was renamed to {printable(one.renamed_to)}"
    if not one.registered:
        return "degraded", "has never run"
    kind = "healthy"
    words = []
    if one.declared is False:
        kind = "degraded"
        words.append("orphaned")
    if one.stopped:
        kind = "broken"
        words.append("stopped")
    if one.paused:
        kind = max(kind, "degraded", key=_KINDS.index)
        words.append("paused")
    if not one.processes:
        kind = max(kind, "broken" if one.lag_events else "degraded", key=_KINDS.index)
        words.append("not running")
    if one.failing:
        kind = max(kind, "degraded", key=_KINDS.index)
        words.append("failing")
    if not {"stopped", "paused", "not running", "failing"} & {*words}:
        words.append("running")
    return kind, ", ".join([*words, _lag(one)])


def _lag(one: ConsumerState) -> str:
    if one.lag_events is None:
        return "lag unknown"
    if not one.lag_events:
        return "nothing behind"
    about = "about " if one.lag_is_estimate else ""
    behind = f"{about}{_count(one.lag_events, 'event')} behind"
    return behind if one.lag_seconds is None else f"{behind}, {age(one.lag_seconds)}"


def details(one: ConsumerState) -> Iterator[str]:
    """What there is to know besides."""
    if one.renamed_to is not None:
        yield f"Rename it in the code, too: {one.declared_at}"
    elif not one.registered:
        yield f"declared at {one.declared_at}"
    elif one.declared is False:
        yield (
            "No code declares it here. If it is not needed any more: manage.py"
            f" eventstream_consumers remove {one.name}"
        )
    for holder in one.holders:
        heartbeat = ""
        if holder.heartbeat_seconds is not None:
            heartbeat = f", heartbeat {age(holder.heartbeat_seconds)} ago"
        name = holder.name or "a process that begins"
        yield f"run by {name}: {_count(len(holder.slots), 'slot')}{heartbeat}"
    if one.holders and one.unheld_slots:
        yield f"{len(one.unheld_slots)} of {SLOTS} slots are held by no process"
    if one.working is not None:
        yield f"works on {one.working.event} for {age(one.working.seconds)}"
    if one.replay_to is not None:
        yield (
            f"handles again what it had handled up to position {one.replay_to:,}; it is at"
            f" {one.position or 0:,}"
        )
    if one.lost is not None:
        yield f"events up to position {one.lost:,} were pruned before it had handled them"
    troubled = [*one.stopped, *one.failing]
    for slot in troubled[:_MOST_TROUBLED]:
        yield _trouble(slot)
    if (more := len(troubled) - _MOST_TROUBLED) > 0:
        yield f"{more} more slots have stopped or fail"
    if one.parked:
        most = "at least " if one.parked >= MOST_COUNTED else ""
        yield (
            f"{most}{_count(one.parked, 'parked event')}: manage.py"
            f" eventstream_consumers parked {one.name}"
        )


def _trouble(one: TroubledSlot) -> str:
    place = f" at {one.event} after {_count(one.attempts, 'attempt')}" if one.event else ""
    if one.retry_seconds is None:
        what = f"has stopped{place}"
    else:
        again = f"in {age(one.retry_seconds)}" if one.retry_seconds else "now"
        what = f"fails{place}, tries again {again}"
    return f"slot {one.slot} {what}: {one.error}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def render_parked(
    name: str, events: Sequence[Parked], *, tracebacks: bool = False, paint: Paint = plain
) -> str:
    """The parked events of a consumer, in their order."""
    if not events:
        return f"The consumer {name!r} has no parked events."
    return "\n".join(_parked_lines(name, events, tracebacks=tracebacks, paint=paint))


def _parked_lines(
    name: str, events: Iterable[Parked], *, tracebacks: bool, paint: Paint
) -> Iterator[str]:
    for event in events:
        tries = _count(event.attempts, "attempt")
        facts = f"{event.type}, {tries}, parked {event.parked_at:%Y-%m-%d %H:%M:%S} UTC"
        if event.retry:
            facts += ", will be tried again"
        yield paint("label", printable(event.id))
        yield from wrap(facts, _INDENT)
        yield from wrap(event.error, _INDENT)
        if tracebacks and event.traceback:
            for line in event.traceback.rstrip().split("\n"):
                yield f"{_INDENT}{printable(line)}"
    yield ""
    command = "manage.py eventstream_consumers"
    yield f"Try again:  {command} retry {printable(name)} [ID ... | --all]"
    yield f"Give up:    {command} skip {printable(name)} ID"
