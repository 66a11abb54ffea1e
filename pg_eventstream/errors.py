"""What can go wrong, in one tree. The message says what to do about it.

EventStreamError
├── InvalidEvent          an event that cannot be sent as it is (also a ValueError)
├── InvalidRequest        a request for a stream that cannot be served as it is
├── ResumeNotAllowed      a client that resumes after a stream-error
├── EventsPruned          a subscription asks for events that are not kept any more
├── EventPermissionError  a user may not read some of the channels asked for
├── NotLeading            another publisher leads, so this one may not publish
└── NotPublished          a publisher that publishes once has not published everything
"""

from __future__ import annotations

from collections.abc import Sequence


class EventStreamError(Exception):
    """Base of every error that pg_eventstream raises on purpose."""


class InvalidEvent(EventStreamError, ValueError):
    """The event cannot be sent as it is; nothing was written."""


class InvalidRequest(EventStreamError):
    """The request for a stream is malformed; its message is shown to the client."""


class ResumeNotAllowed(EventStreamError):
    """The client asks to go on after a ``stream-error``, which ends a stream for good."""


class EventsPruned(EventStreamError):
    """Events of ``channels`` are gone; go on from ``last_event_id`` with a fresh state."""

    def __init__(self, channels: Sequence[str], last_event_id: str) -> None:
        self.channels = list(channels)
        self.last_event_id = last_event_id
        super().__init__(
            f"Events of {', '.join(channels)} that should come next are not kept any more. Read"
            f" the present state, and go on from {last_event_id!r}."
        )


class EventPermissionError(EventStreamError):
    """The user may not read ``channels``."""

    def __init__(self, channels: Sequence[str]) -> None:
        self.channels = list(channels)
        super().__init__(f"Permission denied to channels: {', '.join(channels)}")


class NotLeading(EventStreamError):
    """Another publisher leads; only the leader publishes."""


class NotPublished(EventStreamError):
    """Something was left; the message says what each proxy has taken, and what it has not."""
