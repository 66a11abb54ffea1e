"""Shows consumers and their parked events in 80 columns. It is readable without colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..consumers.overview import Failing, Overview, Parked
from ..postgres.slots import SLOTS
from .ages import age
from .screen import Paint, plain, printable, wrap

_INDENT = "    "
_MOST_FAILING = 5


def render_consumers(consumers: Sequence[Overview], paint: Paint = plain) -> str:
    """All consumers: what each does, and what is wrong."""
    if not consumers:
        return (
            "There are no consumers. Declare one with @consumer in the module event_consumers of an"
            " installed app."
        )
    return "\n".join(line for one in consumers for line in _consumer(one, paint))


def _consumer(one: Overview, paint: Paint) -> Iterator[str]:
    kind, state = _state(one)
    name = printable(one.name)
    yield f"{paint('label', name)}  {paint(kind, state)}"
    for text in _details(one):
        yield from wrap(text, _INDENT + "  ", _INDENT)


def _state(one: Overview) -> tuple[str, str]:
    """What it does now, in a few words, and how bad that is."""
    if one.renamed_to is not None:
        return "broken", f"was renamed to {printable(one.renamed_to)}"
    if not one.has_run:
        return "degraded", "has never run"
    words = []
    kind = "healthy"
    if one.is_orphaned:
        kind = "degraded"
        words.append("orphaned")
    if one.paused:
        kind = "degraded"
        words.append("paused")
    elif not one.holders:
        kind = "broken" if one.lag_events else "degraded"
        words.append("not running")
    elif any(failing.stopped for failing in one.failing):
        kind = "broken"
        words.append("stopped")
    elif one.failing:
        kind = "degraded"
        words.append("failing")
    else:
        words.append("running")
    return kind, ", ".join([*words, _lag(one)])


def _lag(one: Overview) -> str:
    if not one.lag_events:
        return "nothing behind"
    most = "" if one.lag_is_exact else "at most "
    behind = f"{most}{one.lag_events:,} event{'' if one.lag_events == 1 else 's'} behind"
    return behind if one.lag_seconds is None else f"{behind}, {most}{age(one.lag_seconds)}"


def _details(one: Overview) -> Iterator[str]:
    if one.renamed_to is not None:
        yield f"Rename it in the code, too: {one.declared_at}"
    elif not one.has_run:
        yield f"declared at {one.declared_at}"
    elif one.is_orphaned:
        yield (
            "No code declares it here. If it is not needed any more: manage.py"
            f" eventstream_consumers remove {one.name}"
        )
    for holder in one.holders:
        heartbeat = ""
        if holder.heartbeat_seconds is not None:
            heartbeat = f", heartbeat {age(holder.heartbeat_seconds)} ago"
        count = len(holder.slots)
        slots = f"{count} slot{'' if count == 1 else 's'}"
        yield f"run by {holder.name or 'a process that begins'}: {slots}{heartbeat}"
    if one.holders and one.free_slots:
        yield f"{len(one.free_slots)} of {SLOTS} slots are free, and are taken within a second"
    if one.replay_to is not None:
        yield (
            f"handles again what it had handled up to position {one.replay_to:,}:"
            f" {one.replay_left:,} positions left"
        )
    for failing in one.failing[:_MOST_FAILING]:
        yield _failing(failing)
    if (more := len(one.failing) - _MOST_FAILING) > 0:
        yield f"{more} more slots fail or have stopped"
    if one.parked:
        yield (
            f"{one.parked:,} parked event{'' if one.parked == 1 else 's'}: manage.py"
            f" eventstream_consumers parked {one.name}"
        )


def _failing(one: Failing) -> str:
    tries = f"{one.attempts} attempt{'' if one.attempts == 1 else 's'}"
    if one.stopped:
        place = f"stopped at {one.id} after {tries}" if one.id else "stopped"
    elif one.retry_seconds is None:
        place = f"tries {one.id} again after {tries}"
    else:
        place = f"fails at {one.id} after {tries}, tries again in {age(one.retry_seconds)}"
    return f"slot {one.slot} {place}: {one.error}"


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
        tries = f"{event.attempts} attempt{'' if event.attempts == 1 else 's'}"
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
