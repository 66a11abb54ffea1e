"""Sends events from Django at a pace, one transaction each, for as long as it gets orders.

The argument is the way: send_event of pg_eventstream or of django_eventstream, or the floor's
INSERT into a bare table. An order is a line: when to begin, by `time.monotonic`, how many a
second, the first number, how many. The answer is when each was committed, in JSON.
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
#: Of a sender's thread at most; it is busy for about a millisecond or two with each event.
EVENTS_PER_SECOND_OF_A_THREAD, MOST_THREADS = 50, 16

Send = Callable[[dict[str, object], list[float]], None]


def sender(way: str) -> Send:
    """A function that commits an event, and adds the moment at which that was done."""
    from django.db import connection

    if way == PEER:
        from .project.urls import send_one

        # It goes on behind its commit, so that the moment is taken from within.
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
        insert(data)  # a transaction by itself
        committed.append(time.monotonic())

    return send


def work(
    send: Send, numbers: Iterator[int], moment: Callable[[int], float], committed: dict[int, float]
) -> None:
    """A thread's part: the next number, when it is time for it, until there are no more."""
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
                iter(range(first, first + count)),  # one step of it is one of the interpreter
                lambda n, start=start, rate=rate, first=first: start + (n - first) / rate,
                committed,
            )
            threads = min(MOST_THREADS, max(1, rate // EVENTS_PER_SECOND_OF_A_THREAD))
            for future in [pool.submit(work, *arguments) for _ in range(threads)]:
                future.result()
            print(json.dumps(committed), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
