"""What is declared about a consumer: all that the modules which run it need to know."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from django.core.exceptions import ImproperlyConfigured

from ..channels import is_reliable
from ..postgres.slots import follows
from .event import ConsumedEvent, place_of

Handler = Callable[[ConsumedEvent], Any]
Start = Literal["earliest", "latest"]
OnFailure = Literal["park", "park-channel", "stop"]

_MOST_ATTEMPTS, DAY_SECONDS = 1000, 86_400.0


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
        if not is_whole(self.attempts) or not 1 <= self.attempts <= _MOST_ATTEMPTS:
            raise ImproperlyConfigured(
                f"Retry: attempts must be a whole number from 1 to {_MOST_ATTEMPTS:,}; it is"
                f" {self.attempts!r}."
            )
        for name in ("backoff", "longest"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= DAY_SECONDS:
                raise ImproperlyConfigured(
                    f"Retry: {name} must be a number of seconds from 0 to {DAY_SECONDS:,.0f}; it"
                    f" is {value!r}."
                )

    def delay(self, attempts: int) -> float:
        """The seconds to wait after this many attempts failed."""
        delay = min(self.backoff * 2.0 ** min(attempts - 1, 60), self.longest)
        return delay * random.uniform(0.5, 1.0)  # noqa: S311


@dataclass(eq=False)
class Declaration:
    """A function that handles each event of some channels once, in order."""

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

    @property
    def place(self) -> str:
        """Where its function is defined."""
        return place_of(self.handler)

    def follows(self, channel: str) -> bool:
        """Whether it handles the events of the channel. Reserved and unreliable ones: never."""
        return follows(channel, self.channels, self.prefixes) and is_reliable(channel)

    @property
    def prepares_resets(self) -> bool:
        """Whether there is a function for `Consumer.before_reset`."""
        return self._before_reset is not None

    def prepare_reset(self) -> None:
        if self._before_reset is not None:
            self._before_reset()


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
