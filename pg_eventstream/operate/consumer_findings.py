"""Judges the consumers of a state: what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Iterator

from ..conf import conf
from ..consumers.progress import ConsumerState, TroubledSlot
from ..liveness import LATE_SECONDS
from .ages import age
from .finding import Finding
from .state import State

#: A consumer that is this far behind is not just busy for a moment.
LAGGING_SECONDS = 60.0
#: The share of the hold after which an event will soon be pruned without being handled.
_HOLD_NEARLY_OVER = 0.8
_COMMAND = "python manage.py eventstream_consumers"


def judge_consumers(state: State) -> Iterator[Finding]:
    if state.consumers_error is not None:
        yield Finding(
            code="consumers-not-importable",
            level="degraded",
            message="The modules event_consumers of the installed apps cannot be imported:"
            f" {state.consumers_error}. Processes that run consumers cannot start.",
            remedy="Correct the code, or deploy it again.",
        )
    for consumer in state.consumers:
        if consumer.declared is False and not consumer.processes:
            yield _orphaned(consumer)
        else:
            yield from _judge_running(consumer)
        yield from _judge_stopped(consumer)
        if consumer.parked:
            yield _parked(consumer)
        yield from _judge_hold(consumer)


def _orphaned(consumer: ConsumerState) -> Finding:
    return Finding(
        code="consumer-orphaned",
        level="degraded",
        message=f"No code here declares the consumer {consumer.name!r}, and no process runs it. It"
        " keeps events from being pruned.",
        remedy=f"If it has another name in the code: {_COMMAND} rename {consumer.name} NEW. If it"
        f" is not needed any more: {_COMMAND} remove {consumer.name}.",
    )


def _judge_running(consumer: ConsumerState) -> Iterator[Finding]:
    name = consumer.name
    if consumer.renamed_to is not None:
        yield Finding(
            code="consumer-not-running",
            level="broken",
            message=f"The code declares the consumer {name!r}, which has the name"
            f" {consumer.renamed_to!r} now, so it does not run.",
            remedy=f"Rename it in the code, too ({consumer.declared_at}), and deploy that.",
        )
    elif consumer.paused:
        yield Finding(
            code="consumer-paused",
            level="degraded",
            message=f"The consumer {name!r} is paused{_left(consumer)}. It keeps events from being"
            " pruned.",
            remedy=f"To let it continue: {_COMMAND} resume {name}.",
        )
    elif not consumer.processes:
        never = "has never run" if not consumer.registered else "is run by no process"
        yield Finding(
            code="consumer-not-running",
            level="broken",
            message=f"The consumer {name!r} {never}{_left(consumer)}.",
            remedy=f"Start it, and keep it running as a service: {_COMMAND} run",
        )
    elif _is_silent(consumer):
        yield _silent(consumer)
    else:
        if consumer.failing:
            yield _failing(consumer, consumer.failing[0])
        if (consumer.free_lag_seconds or 0) > LAGGING_SECONDS and consumer.replay_to is None:
            yield _lagging(consumer)


def _is_silent(consumer: ConsumerState) -> bool:
    # A handler may take as long as its timeout, after which its process ends.
    allowed = LATE_SECONDS + (consumer.timeout_seconds or 0)
    return consumer.heartbeat_seconds is not None and consumer.heartbeat_seconds > allowed


def _silent(consumer: ConsumerState) -> Finding:
    name, seconds = consumer.name, consumer.heartbeat_seconds or 0
    [holder, *_] = sorted(
        consumer.holders, key=lambda holder: holder.heartbeat_seconds or 0, reverse=True
    )
    if consumer.working is not None:
        working = consumer.working
        return Finding(
            code="consumer-silent",
            level="broken",
            message=f"The handler of the consumer {name!r} has worked on the event {working.event}"
            f" for {working.seconds:.0f} seconds, in the process {working.holder}. The events"
            f" after it wait{_left(consumer)}.",
            remedy="If it hangs, end this process, and another takes over. So that this happens"
            " automatically, give the consumer a timeout.",
        )
    return Finding(
        code="consumer-silent",
        level="broken",
        message=f"The process {holder.name}, which runs the consumer {name!r}, has shown no sign of"
        f" life for {seconds:.0f} seconds: it is suspended, or its machine hangs. No other can take"
        f" over its {len(holder.slots)} slots while its session is open.",
        remedy="Continue or restart it.",
    )


def _failing(consumer: ConsumerState, slot: TroubledSlot) -> Finding:
    more = f" {len(consumer.failing) - 1} more wait as well." if consumer.failing[1:] else ""
    retry = slot.retry_seconds or 0
    again = f"in {age(retry)}" if retry else "now"
    return Finding(
        code="consumer-failing",
        level="degraded",
        message=f"The consumer {consumer.name!r} could not handle the event"
        f" {slot.event or 'at its checkpoint'} (attempts: {slot.attempts}), and tries it again"
        f" {again}: {slot.error}.{more}",
        remedy="Nothing, if it is temporary: after its last attempt the consumer does what its"
        f" on_failure says. To give the event up: {_COMMAND} skip {consumer.name} ID.",
    )


def _lagging(consumer: ConsumerState) -> Finding:
    unheld = len(consumer.unheld_slots)
    return Finding(
        code="consumer-lagging",
        level="degraded",
        message=f"The consumer {consumer.name!r} is {age(consumer.free_lag_seconds or 0)}"
        f" behind{_left(consumer)}."
        + (f" {unheld} of its slots are held by no process." if unheld else ""),
        remedy="Let more processes share the work (run --processes N), handle several events in one"
        " transaction (batch=), or make its function faster. After a start at the earliest event"
        " it needs some time.",
    )


def _judge_stopped(consumer: ConsumerState) -> Iterator[Finding]:
    name = consumer.name
    if consumer.stopped:
        slot = consumer.stopped[0]
        slots = len(consumer.stopped)
        place = f" at the event {slot.event}" if slot.event else ""
        yield Finding(
            code="consumer-stopped",
            level="broken",
            message=f"The consumer {name!r} has stopped{place} ({slots} of its slots):"
            f" {slot.error}",
            remedy=f"Correct the cause, and try again: {_COMMAND} resume {name}. Or give the event"
            f" up: {_COMMAND} skip {name} {slot.event}."
            if slot.event
            else "What the message says. All slots that have stopped then continue.",
        )
    elif consumer.lost is not None:
        yield Finding(
            code="consumer-stopped",
            level="broken",
            message=f"Events that the consumer {name!r} had not handled were pruned, up to position"
            f" {consumer.lost}. It will not continue.",
            remedy="Repair what it has made of the events, and let it continue:"
            f" {_COMMAND} reset {name} --to earliest.",
        )


def _parked(consumer: ConsumerState) -> Finding:
    return Finding(
        code="events-parked",
        level="degraded",
        message=f"The consumer {consumer.name!r} could not handle {consumer.parked} events, which"
        " are parked.",
        remedy=f"See why: {_COMMAND} parked {consumer.name}. Then try them again with retry, or"
        " give them up with skip.",
    )


def _judge_hold(consumer: ConsumerState) -> Iterator[Finding]:
    if conf.retention is None:
        return
    seconds, hold = consumer.lag_seconds or 0, conf.consumer_hold.total_seconds()
    retention = conf.retention.total_seconds()
    if seconds <= retention or consumer.lost is not None:
        return
    is_nearly_over = seconds > max(retention, hold * _HOLD_NEARLY_OVER)
    left = max(0.0, hold - seconds)
    yield Finding(
        code="consumer-holds-events",
        level="broken" if is_nearly_over else "degraded",
        message=f"The consumer {consumer.name!r} has not handled events that are {age(seconds)}"
        " old. They are older than EVENTSTREAM_RETENTION, and kept for it. In"
        f" {age(left)} they are pruned all the same (EVENTSTREAM_CONSUMER_HOLD), and it will have"
        " missed them.",
        remedy="Let it catch up; if another finding concerns it, follow that one first. A longer"
        " EVENTSTREAM_CONSUMER_HOLD gives it more time. If it is not needed any more:"
        f" {_COMMAND} remove {consumer.name}.",
    )


def _left(consumer: ConsumerState) -> str:
    if not consumer.lag_events:
        return ""
    about = "about " if consumer.lag_is_estimate else ""
    oldest = f", the oldest for {age(consumer.lag_seconds)}" if consumer.lag_seconds else ""
    return f"; {about}{consumer.lag_events:,} events wait for it{oldest}"
