"""Sends events from Django at a given rate, one per transaction, as long as it gets orders.

The argument names the system: send_event of pg_eventstream or of django_eventstream, or the floor's
INSERT into a bare table. An order is a line of JSON: when to begin (`time.monotonic`), the events
per second, the first number, and the count. The answer is the time of each commit, in JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import django

from .floor import INSERT
from .servers import OURS, PEER

TEXT = "a line of a chat, as long as such lines are; " * 2
#: The maximum for one thread; each event takes it about one or two milliseconds.
EVENTS_PER_SECOND_OF_A_THREAD, MOST_THREADS = 50, 16

Send = Callable[[dict[str, object], list[float]], None]


def sender(way: str) -> Send:
    """A function that commits an event and appends the time of the commit."""
    from django.db import connection

    if way == PEER:
        from .project.urls import send_one

        # It continues after its commit, so the time is taken inside.
        return lambda data, committed: send_one("room", data, committed)

    if way == OURS:
        from pg_eventstream import send_event

        def insert(data: dict[str, object]) -> None:
            send_event("room", "message", data)
    else:

        def insert(data: dict[str, object]) -> None:
            with connection.cursor() as cursor:
                cursor.execute(INSERT, [json.dumps(data)])

    def send(data: dict[str, object], committed: list[float]) -> None:
        insert(data)  # one transaction
        committed.append(time.monotonic())

    return send


def work(
    send: Send, numbers: Iterator[int], moment: Callable[[int], float], committed: dict[int, float]
) -> None:
    """Send the next number when its time has come, until there are no more. Runs in threads."""
    while (n := next(numbers, None)) is not None:
        time.sleep(max(0.0, moment(n) - time.monotonic()))
        at: list[float] = []
        send({"n": n, "text": TEXT}, at)
        committed[n] = at[0]


def main(way: str) -> None:
    django.setup()
    send = sender(way)
    print("ready", flush=True)
    with ThreadPoolExecutor(MOST_THREADS) as pool:
        for order in sys.stdin:
            start, rate, first, count = json.loads(order)
            committed: dict[int, float] = {}
            arguments = (
                send,
                iter(range(first, first + count)),  # next() on it is atomic
                lambda n, start=start, rate=rate, first=first: start + (n - first) / rate,
                committed,
            )
            threads = min(MOST_THREADS, max(1, rate // EVENTS_PER_SECOND_OF_A_THREAD))
            for future in [pool.submit(work, *arguments) for _ in range(threads)]:
                future.result()
            print(json.dumps(committed), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
