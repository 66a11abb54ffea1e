"""Durable consumers: functions that handle each event once, in order.

    declaration  what is declared about a consumer
    declare      the decorator, and the list of all consumers
    event        events as consumers get them; old versions of their data
    checkpoints  what is stored: how far each slot is, what fails
    reader       reads a page of the stream
    handling     the transaction of a handler
    held         the slots that a process holds, in its memory
    runner       handles their events, on one thread per consumer
    failures     counts attempts, parks events and stops slots
    measures     counts and measures for Prometheus
    parked       events that could not be handled
    share        distributes the slots among processes, and sequences where no publisher does
    worker       one process: the runners, and the watch over handlers that hang
    supervisor   starts the processes, and replaces those that end
    progress     how far all consumers are, and what keeps them
    waiting      waits until a consumer has handled what was committed
    delivery     runs consumers in the transaction of a test
    operations   what a person does: pause, reset, rename, remove, parked events
    exclusive    the transaction of an operation, during which no event is handled
    targets      where a reset leads
    trouble      the events that wait for a person

A consumer has 16 slots (`postgres.slots`), each with a checkpoint of its own. A process holds the
session lock of a slot while it handles the slot's events.

Imports neither `publisher`, `streams`, `grip` nor `operate`.
"""

from ..errors import DoNotRetry
from .declaration import Retry
from .declare import Consumer, consumer
from .event import ConsumedEvent, upcast

__all__ = ["ConsumedEvent", "Consumer", "DoNotRetry", "Retry", "consumer", "upcast"]
