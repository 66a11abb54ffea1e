"""A process that sends from Django, one transaction per event, as fast as it can.

    python -m benchmarks.sender WAY CHANNEL

It prints "ready", reads a number of seconds from its standard input, sends for that long, and
prints how many transactions it committed and how many seconds of processor time they took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module

import django
from django.db import connection, transaction

DATA = {"text": "a line of a chat, as long as such lines are", "author": 17}
WARM_UP = 20


def way(name: str, channel: str) -> Callable[[], None]:
    """A function that sends one event."""
    if name == "bare INSERT":
        # The statement of `send_event`, for a table without a trigger.
        insert = "INSERT INTO bare (channel, type, data) VALUES (%s, %s, %s)"

        def send() -> None:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute(insert, [channel, "message", json.dumps(DATA)])

    elif name == "pgpubsub":
        from .project.models import Message

        def send() -> None:
            with transaction.atomic():
                Message(channel=channel, data=json.dumps(DATA)).save()

    else:
        send_event = import_module(name).send_event

        def send() -> None:
            with transaction.atomic():
                send_event(channel, "message", DATA)

    return send


def main() -> None:
    django.setup()
    send = way(*sys.argv[1:])
    for _ in range(WARM_UP):
        send()
    print("ready", flush=True)
    seconds = float(sys.stdin.readline())
    count = 0
    end = time.monotonic() + seconds
    began = time.process_time()
    while time.monotonic() < end:
        send()
        count += 1
    print(count, time.process_time() - began, flush=True)


if __name__ == "__main__":
    main()
