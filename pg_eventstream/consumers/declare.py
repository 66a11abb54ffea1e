"""Declares consumers: the decorator, and the list of all that are declared."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, get_args

from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import autodiscover_modules

from ..channels import RESERVED, is_reliable, problem_of_name
from ..postgres.slots import follows
from .event import ConsumedEvent, place_of

#: The name of the module that is imported from each installed app.
MODULE = "event_consumers"

Handler = Callable[[ConsumedEvent], Any]
Start = Literal["earliest", "latest"]
OnFailure = Literal["park", "park-channel", "stop"]

_MOST_ATTEMPTS, _MOST_BATCH, _DAY_SECONDS = 1000, 10_000, 86_400.0


@dataclass(frozen=True, slots=True)
class Retry:
    """How often an event is tried, and how long after a failure it is tried again.

    ``attempts`` includes the first. The first delay is ``backoff`` seconds; each one is twice as
    long as the one before it, up to ``longest`` seconds, and is shortened at random by up to half.
    """

    attempts: int = 5
    backoff: float = 2.0
    longest: float = 300.0

    def __post_init__(self) -> None:
        if not _is_whole(self.attempts) or not 1 <= self.attempts <= _MOST_ATTEMPTS:
            raise ImproperlyConfigured(
                f"Retry: attempts must be a whole number from 1 to {_MOST_ATTEMPTS:,}; it is"
                f" {self.attempts!r}."
            )
        for name in ("backoff", "longest"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= _DAY_SECONDS:
                raise ImproperlyConfigured(
                    f"Retry: {name} must be a number of seconds from 0 to {_DAY_SECONDS:,.0f}; it"
                    f" is {value!r}."
                )

    def delay(self, attempts: int) -> float:
        """The seconds to wait after this many attempts failed."""
        delay = min(self.backoff * 2.0 ** min(attempts - 1, 60), self.longest)
        return delay * random.uniform(0.5, 1.0)  # noqa: S311


@dataclass(eq=False)
class Consumer:
    """A function that handles each event of some channels once, in order. Made by `consumer`.

    Calling it calls the function, which is useful in tests.
    """

    name: str
    handler: Handler
    channels: tuple[str, ...]
    prefixes: tuple[str, ...]
    start: Start
    retry: Retry
    on_failure: OnFailure
    batch: int
    timeout: float | None
    _before_reset: Callable[[], object] | None = field(default=None, repr=False)

    def __call__(self, event: ConsumedEvent) -> Any:
        return self.handler(event)

    @property
    def place(self) -> str:
        """Where its function is defined."""
        return place_of(self.handler)

    def follows(self, channel: str) -> bool:
        """Whether it handles the events of the channel. Reserved and unreliable ones: never."""
        return follows(channel, self.channels, self.prefixes) and is_reliable(channel)

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
        from .waiting import wait

        return wait(self, timeout)

    def drain(self) -> int:
        """Handle everything that is committed by now, in this thread. Returns how many events.

        For scripts and for tests with real commits. If the function raises, so does this, and no
        attempt is counted. It works together with processes that run the consumer.

        Raises `TransactionManagementError` inside ``transaction.atomic()``, and `ConsumerStopped`
        if the consumer is paused.
        """
        from .worker import drain

        return drain(self)

    @property
    def prepares_resets(self) -> bool:
        """Whether there is a function for `before_reset`."""
        return self._before_reset is not None

    def prepare_reset(self) -> None:
        if self._before_reset is not None:
            self._before_reset()


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
    if not _is_whole(batch) or not 1 <= batch <= _MOST_BATCH:
        raise ImproperlyConfigured(
            f"Consumer {name!r}: batch must be a whole number from 1 to {_MOST_BATCH:,}; it is"
            f" {batch!r}."
        )
    if timeout is not None and (not _is_number(timeout) or not 0 < timeout <= _DAY_SECONDS):
        raise ImproperlyConfigured(
            f"Consumer {name!r}: timeout must be a number of seconds, greater than 0 and at most"
            f" {_DAY_SECONDS:,.0f}, or None; it is {timeout!r}."
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


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
