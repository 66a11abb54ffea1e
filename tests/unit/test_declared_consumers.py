"""What `@consumer`, `Retry` and `@upcast` accept, and what they say otherwise."""

from __future__ import annotations

import functools
from datetime import datetime, timezone
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from pg_eventstream.consumers import ConsumedEvent, Consumer, Retry, consumer, upcast
from pg_eventstream.postgres.slots import slot_of


def handle(event: ConsumedEvent) -> None:
    pass


async def handle_async(event: ConsumedEvent) -> None:
    pass


async def generate_async(event: ConsumedEvent) -> Any:
    yield


def generate(event: ConsumedEvent) -> Any:
    yield


class Asynchronous:
    async def __call__(self, event: ConsumedEvent) -> None:
        pass


class Callable:
    def __call__(self, event: ConsumedEvent) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "must not be empty"),
        ({"name": 3}, "must be a string"),
        ({"name": "a\nb"}, "must not contain CR, LF or NUL"),
        ({"name": "a" * 256}, "the limit is 255"),
        ({"channels": "orders"}, r"must be a list, such as \['orders'\]"),
        ({"prefixes": "orders"}, r"must be a list, such as \['orders'\]"),
        ({"channels": []}, "would handle nothing"),
        ({"channels": [3]}, "must be strings"),
        ({"channels": [""]}, "must not be empty"),
        ({"prefixes": [""]}, "must not be empty"),
        ({"channels": ["pg_eventstream:permission"]}, "are reserved"),
        ({"prefixes": ["pg_eventstream:"]}, "are reserved"),
        ({"start": "now"}, 'must be "earliest" or "latest"'),
        ({"retry": 5}, r"such as Retry\(5, backoff=2\)"),
        ({"on_failure": "ignore"}, 'must be "park", "park-channel" or "stop"'),
        ({"batch": 0}, "from 1 to 10,000"),
        ({"batch": 10_001}, "from 1 to 10,000"),
        ({"batch": True}, "from 1 to 10,000"),
        ({"batch": 1.5}, "from 1 to 10,000"),
        ({"timeout": 0}, "greater than 0"),
        ({"timeout": "1"}, "greater than 0"),
        ({"timeout": 86_401}, "at most 86,400"),
    ],
)
def test_wrong_argument_is_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"name": "stock", **options}
    with pytest.raises(ImproperlyConfigured, match=message):
        consumer(arguments.pop("name"), **arguments)


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (handle_async, "is asynchronous"),
        (generate_async, "is asynchronous"),
        (Asynchronous(), "is asynchronous"),
        (functools.partial(handle_async), "is asynchronous"),
        (generate, "is a generator function"),
        (None, "cannot be called"),
    ],
)
def test_function_that_would_do_nothing_is_refused(handler: Any, message: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=message):
        consumer("stock")(handler)
    with pytest.raises(ImproperlyConfigured, match="asynchronous"):
        consumer("stock")(handle).before_reset(handle_async)  # type: ignore[arg-type]


@pytest.mark.parametrize("handler", [handle, Callable(), functools.partial(handle), lambda e: None])
def test_callables(handler: Any) -> None:
    assert consumer("stock", channels=["a", "a"])(handler).channels == ("a",)


def test_two_consumers_cannot_have_one_name() -> None:
    consumer("stock")(handle)
    consumer("stock")(handle)  # its module was loaded again
    with pytest.raises(ImproperlyConfigured, match=r"two consumers 'stock': .*handle and .*lambda"):
        consumer("stock")(lambda event: generate(event))
    with pytest.raises(ImproperlyConfigured, match="is the consumer 'stock' already"):
        consumer("other")(consumer("stock")(handle))


def test_consumer_can_be_called() -> None:
    seen: list[ConsumedEvent] = []
    made: Consumer = consumer("stock")(seen.append)
    event = event_with({})
    made(event)
    assert seen == [event]


def test_delays_double_up_to_the_longest() -> None:
    retry = Retry(5, backoff=2, longest=10)
    for attempts, seconds in [(1, 2), (2, 4), (3, 8), (4, 10), (1000, 10)]:
        delays = [retry.delay(attempts) for _ in range(50)]
        assert all(seconds / 2 <= delay <= seconds for delay in delays)
        assert len(set(delays)) > 1


@pytest.mark.parametrize("wrong", [0, -1, 1001, 1.5, True, "3", None])
def test_wrong_number_of_attempts(wrong: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match="from 1 to 1,000"):
        Retry(wrong)


@pytest.mark.parametrize("wrong", [-1, 86_401, "3", None, True, float("nan")])
def test_wrong_delay(wrong: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match="number of seconds from 0 to 86,400"):
        Retry(3, backoff=wrong)


def event_with(meta: Any, data: str = "{}") -> ConsumedEvent:
    return ConsumedEvent("c:1", "c", 1, "placed", data, meta, 1, datetime.now(timezone.utc), None)


@pytest.mark.parametrize(
    ("meta", "version"),
    [(None, 1), ({}, 1), ({"version": 3}, 3), ({"version": "3"}, 1), ({"version": True}, 1),
     ([1], 1), ("text", 1)],
)  # fmt: skip
def test_version_of_an_event(meta: Any, version: int) -> None:
    assert event_with(meta).version == version


def test_two_functions_cannot_convert_the_same_version() -> None:
    upcast("test-twice", from_version=1)(handle)
    upcast("test-twice", from_version=1)(handle)
    with pytest.raises(ImproperlyConfigured, match="Two functions upcast"):
        upcast("test-twice", from_version=1)(generate)
    with pytest.raises(ImproperlyConfigured, match="must be a whole number"):
        upcast("test-twice", from_version="1")  # type: ignore[arg-type]


def test_slot_of_a_channel_never_changes() -> None:
    """Events of channels would otherwise be handled twice, or never, after an upgrade."""
    names = ["orders", "", "a", "ünï", "\U0001f389", "x" * 255]
    assert [slot_of(name) for name in names] == [12, 3, 10, 9, 1, 2]
