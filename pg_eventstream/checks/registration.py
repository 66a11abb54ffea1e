"""Lets a system check be written as a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from django.core.checks import CheckMessage, register


def register_check(
    *tags: str,
) -> Callable[[Callable[..., Iterator[CheckMessage]]], Callable[..., list[CheckMessage]]]:
    """Register a generator of messages as a system check, which has to return a list."""

    def decorate(
        generator: Callable[..., Iterator[CheckMessage]],
    ) -> Callable[..., list[CheckMessage]]:
        @register(*tags)
        @wraps(generator)
        def check(**kwargs: Any) -> list[CheckMessage]:
            return list(generator(**kwargs))

        return check

    return decorate
