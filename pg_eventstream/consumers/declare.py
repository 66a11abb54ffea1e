"""Declares consumers: the decorator, and the list of all that are declared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_args

from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import autodiscover_modules

from ..channels import RESERVED, problem_of_name
from .declaration import (
    DAY_SECONDS,
    Declaration,
    Handler,
    OnFailure,
    Retry,
    Start,
    is_number,
    is_whole,
)
from .event import ConsumedEvent

#: The name of the module that is imported from each installed app.
MODULE = "event_consumers"

_MOST_BATCH = 10_000


@dataclass(eq=False)
class Consumer(Declaration):
    """A function that handles each event of some channels once, in order. Made by `consumer`.

    Calling it calls the function, which is useful in tests.
    """

    def __call__(self, event: ConsumedEvent) -> Any:
        return self.handler(event)

    def before_reset(self, function: Callable[[], object]) -> Callable[[], object]:
        """Call ``function`` when the consumer is reset, in the same transaction: a decorator.

        It removes what the consumer has made of the events that it is to handle again.
        """
        if inspect.iscoroutinefunction(function):
            raise ImproperlyConfigured(_no_async(f"{self.name}.before_reset"))
        self._before_reset = function
        return function

    def wait(self, timeout: float) -> bool:
        """Wait until the consumer has handled everything that was committed before this call.

        Returns whether it has; False after ``timeout`` seconds. A parked event counts as handled.
        This reads your own writes: commit, redirect, wait, and then show what the consumer has
        made of the event. It needs no id of an event, and no right to put events in order.

        Raises `TransactionManagementError` inside ``transaction.atomic()``, whose events are not
        committed yet.
        """
        from .waiting import wait  # not before the apps are ready

        return wait(self, timeout)

    def drain(self) -> int:
        """Handle everything that is committed by now, in this thread. Returns how many events.

        For scripts and for tests with real commits. If the function raises, so does this, and no
        attempt is counted. It works together with processes that run the consumer.

        Raises `TransactionManagementError` inside ``transaction.atomic()``, and `ConsumerStopped`
        if the consumer is paused.
        """
        from .worker import drain  # not before the apps are ready

        return drain(self)


_declared: dict[str, Consumer] = {}


def consumer(
    name: str,
    *,
    channels: Iterable[str] | None = None,
    prefixes: Iterable[str] = (),
    start: Start = "latest",
    retry: Retry | None = None,
    on_failure: OnFailure = "park",
    batch: int = 1,
    timeout: float | None = None,
) -> Callable[[Handler], Consumer]:
    """Declare a durable consumer: ``@consumer("stock", channels=["orders"])``.

    The function is called with each event of the channels, once and in the order of each channel,
    by ``manage.py eventstream_consumers run``. It runs in a transaction of the events' database
    that also stores how far the consumer is. So what it writes there is written exactly once. All
    else that it does (mail, HTTP, another database) can happen again if the process dies, so use
    the event's ``id`` to recognize it.

    ``channels`` are names and ``prefixes`` beginnings of names; without both, it handles all
    channels. Events of unreliable channels are not handled. ``start`` says where it begins when it
    runs for the first time: with the ``"earliest"`` stored event, or with the ``"latest"``, which
    means with what is sent from then on. ``batch`` events are handled in one transaction; if one of
    them fails, they are handled again, one by one.

    If the function raises, the event is tried again as ``retry`` says (by default 5 times, after
    2, 4, 8 and 16 seconds), and events of other channels go on. After the last attempt ``"park"``
    keeps a copy of the event and continues with the next; ``"park-channel"`` also parks the later
    events of the same channel, so that none is handled before it; ``"stop"`` waits for a person,
    and with it all channels of the same slot wait. A process that works on one event for more than
    ``timeout`` seconds is ended and replaced, and that counts as a failed attempt.

    Raises `ImproperlyConfigured` if an argument is wrong, the name is taken, or the function is
    asynchronous.
    """
    names = _names(f"consumer {name!r}: channels", channels or ())
    beginnings = _names(f"consumer {name!r}: prefixes", prefixes)
    _check(name, channels, names, beginnings, start, retry, on_failure, batch, timeout)

    def declare(handler: Handler) -> Consumer:
        if isinstance(handler, Consumer):
            raise ImproperlyConfigured(
                f"Consumer {name!r}: the function is the consumer {handler.name!r} already. Declare"
                " one of them, and call it from a second function."
            )
        _check_handler(name, handler)
        made = Consumer(
            name, handler, names, beginnings, start, retry or Retry(), on_failure, batch, timeout
        )
        known = _declared.get(name)
        if known is not None and known.place != made.place:
            raise ImproperlyConfigured(
                f"There are two consumers {name!r}: {known.place} and {made.place}. Rename one."
            )
        _declared[name] = made
        return made

    return declare


def discover() -> dict[str, Consumer]:
    """Import ``event_consumers`` from every installed app. Returns all consumers by name."""
    autodiscover_modules(MODULE)
    return dict(sorted(_declared.items()))


def _names(what: str, values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ImproperlyConfigured(f"The {what} must be a list, such as [{values!r}].")
    names = tuple(dict.fromkeys(values))
    for name in names:
        if not isinstance(name, str):
            raise ImproperlyConfigured(f"The {what} must be strings, not {name!r}.")
        if problem := problem_of_name(name):
            raise ImproperlyConfigured(f"The {what}: {name!r} {problem}.")
        if name.startswith(RESERVED):
            raise ImproperlyConfigured(
                f"The {what}: names that begin with {RESERVED!r} are reserved, and no consumer"
                " handles their events."
            )
    return names


def _check(
    name: object,
    channels: Iterable[str] | None,
    names: tuple[str, ...],
    prefixes: tuple[str, ...],
    start: object,
    retry: object,
    on_failure: object,
    batch: object,
    timeout: object,
) -> None:
    if not isinstance(name, str) or (problem := problem_of_name(name)):
        problem = problem if isinstance(name, str) else "must be a string"
        raise ImproperlyConfigured(f"The name of a consumer, {name!r}, {problem}.")
    if channels is not None and not names and not prefixes:
        raise ImproperlyConfigured(
            f"Consumer {name!r}: channels is empty, so it would handle nothing. Leave it out to"
            " handle all channels."
        )
    if start not in get_args(Start):
        raise ImproperlyConfigured(
            f'Consumer {name!r}: start must be "earliest" or "latest", not {start!r}.'
        )
    if retry is not None and not isinstance(retry, Retry):
        raise ImproperlyConfigured(
            f"Consumer {name!r}: retry must be a Retry, such as Retry(5, backoff=2), not {retry!r}."
        )
    if on_failure not in get_args(OnFailure):
        raise ImproperlyConfigured(
            f'Consumer {name!r}: on_failure must be "park", "park-channel" or "stop", not'
            f" {on_failure!r}."
        )
    if not is_whole(batch) or not 1 <= batch <= _MOST_BATCH:
        raise ImproperlyConfigured(
            f"Consumer {name!r}: batch must be a whole number from 1 to {_MOST_BATCH:,}; it is"
            f" {batch!r}."
        )
    if timeout is not None and (not is_number(timeout) or not 0 < timeout <= DAY_SECONDS):
        raise ImproperlyConfigured(
            f"Consumer {name!r}: timeout must be a number of seconds, greater than 0 and at most"
            f" {DAY_SECONDS:,.0f}, or None; it is {timeout!r}."
        )


def _check_handler(name: str, handler: object) -> None:
    if not callable(handler):
        raise ImproperlyConfigured(f"Consumer {name!r}: {handler!r} cannot be called.")
    call = getattr(handler, "__call__", None)  # noqa: B004
    if any(
        inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (handler, call)
    ):
        raise ImproperlyConfigured(_no_async(repr(name)))
    if inspect.isgeneratorfunction(handler):
        raise ImproperlyConfigured(
            f"Consumer {name!r} is a generator function, so calling it would do nothing. Remove"
            " the yield."
        )


def _no_async(name: str) -> str:
    return (
        f"Consumer {name} is asynchronous, and a transaction of Django's cannot span awaits. Use a"
        " plain function; asgiref.sync.async_to_sync calls asynchronous code from it."
    )
