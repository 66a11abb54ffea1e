"""The exceptions. Their messages say what is wrong and what to do.

EventStreamError
├── InvalidEvent          the event cannot be sent (also a ValueError)
├── InvalidRequest        the request for a stream is malformed
├── ResumeNotAllowed      a client resumes after a stream-error
├── EventsPruned          a subscription asks for events that have been pruned
│   └── ConsumerMissedEvents   a consumer does: they were pruned before it had handled them
├── CheckpointAhead       a consumer has handled more events than there are
├── UnknownConsumer       there is no consumer of this name, or it has another name now
├── ConsumerStopped       a consumer cannot go on before a person has decided
├── ConsumerBusy          a consumer could not be changed, because a handler does not end
├── OperationRefused      a consumer was not changed, because that would not make sense
├── EventPermissionError  the user may not read some of the requested channels
├── NotLeading            another publisher leads, and only the leader publishes
└── NotPublished          eventstream_publisher --once could not publish everything
"""

from __future__ import annotations

from collections.abc import Sequence


class EventStreamError(Exception):
    """The base class of the errors that pg_eventstream raises."""


class InvalidEvent(EventStreamError, ValueError):
    """The event cannot be sent. Nothing was written."""


class InvalidRequest(EventStreamError):
    """The request for a stream is malformed. The client is shown the message."""


class ResumeNotAllowed(EventStreamError):
    """The client tries to resume after a ``stream-error``, which ends a stream permanently."""


class EventsPruned(EventStreamError):
    """The next events of ``channels`` have been pruned.

    To continue, read the current state again and subscribe from ``last_event_id``.
    """

    def __init__(self, channels: Sequence[str], last_event_id: str) -> None:
        self.channels = list(channels)
        self.last_event_id = last_event_id
        super().__init__(
            f"The next events of {', '.join(channels)} have been pruned. Read the current state"
            f" again, and continue from {last_event_id!r}."
        )


class ConsumerMissedEvents(EventsPruned):
    """Events up to ``position`` were pruned before the consumer had handled them."""

    def __init__(self, consumer: str, slot: int, position: int) -> None:
        self.channels = []
        self.last_event_id = ""
        self.position = position
        EventStreamError.__init__(
            self,
            f"Events that the consumer {consumer!r} had not handled were pruned, up to position"
            f" {position} (slot {slot}). Repair what it has made of the events, and let it"
            f" continue: manage.py eventstream_consumers reset {consumer} --to earliest",
        )


class CheckpointAhead(EventStreamError):
    """A consumer has handled more events than there are: the stream was emptied or restored."""

    def __init__(self, consumer: str, slot: int, position: int, last: int) -> None:
        super().__init__(
            f"The consumer {consumer!r} has handled events up to position {position} (slot {slot}),"
            f" but of these the stream has only those up to {last}: it was emptied, restored or"
            " replaced. Repair what the consumer has made of the events, and let it continue:"
            f" manage.py eventstream_consumers reset {consumer} --to {max(last, 0)}, or --to"
            " earliest",
        )


class UnknownConsumer(EventStreamError):
    """There is no consumer of this name, or it has another name now."""


class ConsumerStopped(EventStreamError):
    """A consumer cannot go on before a person has decided. The message says what to do."""


class DoNotRetry(EventStreamError):
    """Raise this in a handler if no further attempt can help: the event counts as tried enough.

    Then the consumer does what its ``on_failure`` says.
    """


class ConsumerBusy(EventStreamError):
    """A handler holds its transaction open for so long that the consumer could not be changed."""


class OperationRefused(EventStreamError):
    """Nothing was changed, because what was asked for makes no sense here."""


class EventPermissionError(EventStreamError):
    """The user may not read ``channels``."""

    def __init__(self, channels: Sequence[str]) -> None:
        self.channels = list(channels)
        super().__init__(f"Permission denied to channels: {', '.join(channels)}")


class NotLeading(EventStreamError):
    """Another publisher leads, and only the leader publishes."""


class NotPublished(EventStreamError):
    """Not everything was published. The message says what each proxy has taken and has not."""
