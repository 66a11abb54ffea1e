"""How often an event is tried, and what follows: for each ``on_failure``, singly and in batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pg_eventstream import send_events
from pg_eventstream.consumers import ConsumedEvent, DoNotRetry, Retry, consumer, operations
from pg_eventstream.errors import ConsumerStopped
from tests.support.consumers import Handled, handle_all
from tests.support.database import Database
from tests.support.handlers import record


class NoSuchReceiver(DoNotRetry):
    """Projects can have errors of their own."""


#: What the handler raises at each attempt, how often it may be tried, and how often it is.
WAYS: dict[str, tuple[list[Exception], Retry, int]] = {
    "cannot help": ([DoNotRetry("gone")], Retry(5, backoff=600), 1),
    "an error of the project's": ([NoSuchReceiver("gone")], Retry(5, backoff=600), 1),
    "cannot help any more": ([ValueError("x"), DoNotRetry("gone")], Retry(5, backoff=0), 2),
    "is the last": ([ValueError("x"), DoNotRetry("gone")], Retry(2, backoff=0), 2),
    "is not to be retried": ([ValueError("gone")], Retry(1), 1),
    "is not to be retried, and cannot help": ([DoNotRetry("gone")], Retry(1), 1),
}
#: By ``on_failure``: what is handled of the channel of the second event, which fails, and what is
#: parked with how many attempts; "n" stands for the number above.
OUTCOMES: dict[str, tuple[list[int], list[tuple[str, int, Any]]]] = {
    "park": ([1, 3], [("a", 2, "n")]),
    "park-channel": ([1], [("a", 2, "n"), ("a", 3, 0)]),
    "stop": ([1], []),
}


@pytest.fixture
def calls() -> list[tuple[int, int]]:
    """The eid and the attempt of each call for the channel a."""
    return []


def failing(errors: list[Exception], calls: list[tuple[int, int]]) -> Callable[..., None]:
    def handle(event: ConsumedEvent) -> None:
        record(event, "stock")
        if event.channel == "a":
            calls.append((event.eid, event.attempt))
            if event.eid == 2:
                raise errors[min(event.attempt, len(errors)) - 1]

    return handle


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("on_failure", OUTCOMES)
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            way,
            marks=[]
            if way in ("cannot help", "is not to be retried")
            else [pytest.mark.faults, pytest.mark.thorough],
        )
        for way in WAYS
    ],
)
def test_event_is_tried_as_often_as_it_can_help(
    database: Database,
    handled: Handled,
    caplog: pytest.LogCaptureFixture,
    calls: list[tuple[int, int]],
    way: str,
    on_failure: Any,
    batch: int,
) -> None:
    errors, retry, attempts = WAYS[way]
    eids, expected = OUTCOMES[on_failure]
    stock = consumer("stock", start="earliest", retry=retry, on_failure=on_failure, batch=batch)(
        failing(errors, calls)
    )

    def run() -> None:
        if on_failure == "stop":
            with pytest.raises(ConsumerStopped, match=r"has stopped.*gone"):
                handle_all(stock)
        else:
            handle_all(stock)

    def stored() -> list[tuple[Any, ...]]:
        return database.fetch(
            "SELECT channel, number, attempts FROM pg_eventstream_parked ORDER BY position"
        )

    send_events([("a", "m", 1), ("a", "m", 2), ("a", "m", 3), ("b", "m", 1)])
    for _ in range(2):  # nor after a restart
        run()
    assert handled.eids("stock") == {"a": eids, "b": [1]}
    assert stored() == [(c, n, attempts if of == "n" else of) for c, n, of in expected]
    # Those of a batch are not counted.
    tried = [attempt for eid, attempt in calls if eid == 2]
    assert [*dict.fromkeys(tried)] == [*range(1, attempts + 1)]
    assert len(tried) == attempts + (batch > 1)
    said = f"event a:2: attempt {attempts} of {retry.attempts} failed: {type(errors[-1]).__name__}"
    assert caplog.text.count(said) == 1
    stopped = database.fetch("SELECT failing, attempts FROM pg_eventstream_slot WHERE stopped")
    assert stopped == ([(2, attempts)] if on_failure == "stop" else [])
    # A person lets it be tried again: once, and if it stops, as often as the first time.
    calls.clear()
    if on_failure == "stop":
        operations.resume("default", "stock")
        run()
        assert [attempt for eid, attempt in calls if eid == 2][-1] == attempts
    else:
        operations.retry("default", "stock", ["a:2"])
        run()
        assert calls == [(2, attempts + 1)]
        assert stored()[0] == ("a", 2, attempts + 1)
    assert handled.eids("stock") == {"a": eids, "b": [1]}
