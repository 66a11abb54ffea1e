"""Hints follow a burst when nothing else would show a client that it missed events."""

from __future__ import annotations

from collections.abc import Iterable

from pg_eventstream.grip.hints import Hints
from pg_eventstream.grip.items import Batch, hint, item
from pg_eventstream.stream_event import Row, StreamEvent

HINT = hint("c")


def batch(*eids: int) -> Batch:
    rows: list[Row] = [StreamEvent(eid, "c", eid, eid - 1, "message", "{}", []) for eid in eids]
    return Batch(rows, [item(row) for row in rows])


def times(hints: Hints, moments: Iterable[float]) -> list[float]:
    """The moments at which a hint was sent."""
    return [now for now in moments if hints.take_due(now) == [HINT]]


def test_burst_is_followed_by_a_hint_and_by_one_more_a_little_later() -> None:
    hints = Hints()
    hints.note(batch(*range(1, 51)), 0.0)
    assert hints.next_due() == 0.5
    assert times(hints, [0.4, 0.5, 0.6, 4.9, 5.0, 5.1, 60.0]) == [0.5, 5.0]
    assert hints.next_due() is None


def test_steady_stream_of_events_is_not_interrupted_by_hints() -> None:
    """Each event reveals a gap, and a hint costs a stream the time of a fetch."""
    for per_second in (50, 60, 75, 100, 1000):
        hints = Hints()
        moments = [n / per_second for n in range(10 * per_second)]
        for n, now in enumerate(moments):
            hints.note(batch(n + 1), now)
            assert hints.take_due(now) == []
        end = moments[-1]
        assert times(hints, [end + 0.4, end + 0.6, end + 4.9, end + 5.1, end + 60]) == [
            end + 0.6,
            end + 5.1,
        ]


def test_event_after_a_burst_replaces_the_hint_that_was_due() -> None:
    hints = Hints()
    hints.note(batch(*range(1, 51)), 0.0)
    assert times(hints, [0.5]) == [0.5]
    hints.note(batch(51), 4.0)
    assert times(hints, [5.0, 8.4, 8.5, 60.0]) == [8.5]


def test_few_events_are_followed_by_no_hint() -> None:
    hints = Hints()
    hints.note(batch(*range(1, 50)), 0.0)
    hints.note(batch(50), 1.0)
    assert hints.next_due() is None
