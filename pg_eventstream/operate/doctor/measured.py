"""What the doctor has measured on the way of an event."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from django.db import DatabaseError

from .client import Answer, Trouble


@dataclass(slots=True, kw_only=True)
class Way:
    """When a probe was at each station, in seconds. None if it was not there in time.

    ``committed`` is how long its transaction took, and the others count from its end.
    """

    committed: float
    sequenced: float | None = None
    #: When all proxies had acknowledged it. It is known only to within half a second.
    published: float | None = None
    received: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """How a steady load arrived. ``p50`` and ``p99`` are seconds from the commit to the client."""

    sent: int
    #: Events a second, as they were sent.
    rate: float
    received: int
    in_order: bool
    p50: float | None
    p99: float | None


@dataclass(slots=True, kw_only=True)
class Measured:
    """What the doctor has measured. None where it did not get that far."""

    url: str
    #: Why there was no response.
    trouble: Trouble | None = None
    answer: Answer | None = None
    #: Seconds until the stream was open.
    opened: float | None = None
    #: What the endpoint says of itself: see `doctor.describe`.
    description: dict[str, Any] | None = None
    #: The data of a ``stream-error``.
    error: dict[str, Any] | None = None
    #: The clocks of the database, of the application and of the server at the URL, minus ours.
    clocks: dict[str, float] = field(default_factory=dict)
    #: Identifies the table that this process sends to.
    table: str | None = None
    #: Why a probe could not be sent.
    refused: DatabaseError | None = None
    probe: Way | None = None
    #: Whether more data pushed out what was held back on the way.
    was_held_back: bool = False
    #: Seconds until the stream was continued by its next link. None also without a proxy.
    continued: float | None = None
    #: Whether it should have been continued and was not.
    has_stopped: bool = False
    #: The answer to our own request for the next link, if the stream was not continued.
    link: Answer | None = None
    steady: Steady | None = None
    #: The events after a resume, of which there must be two: a missed one and a new one.
    resumed: list[str] | None = None
    #: Whether the connection was closed early.
    was_closed: bool = False

    @property
    def has_resumed(self) -> bool:
        return self.resumed == ["missed", "new"]

    @property
    def reads_another_table(self) -> bool:
        """Whether the application reads another table than the one that probes are sent to."""
        theirs = (self.description or {}).get("table")
        return theirs is not None and theirs != self.table

    @property
    def unverified(self) -> tuple[str, str, str] | None:
        """Why the application does not accept the signature of the proxy: code, reason, remedy."""
        match (self.description or {}).get("unverified"):
            case [str() as code, str() as reason, str() as remedy]:
                return code, reason, remedy
        return None

    @property
    def shows_why_it_stopped(self) -> bool:
        """Whether something else than the endpoint answers our own request for the next link."""
        return self.link is not None and (self.link.status == 404 or 300 <= self.link.status < 400)

    @property
    def is_unpublished(self) -> bool:
        """Whether a probe was put in order, but not taken by all proxies."""
        way = self.probe
        return way is not None and way.sequenced is not None and way.published is None

    @property
    def is_proxied(self) -> bool:
        return bool(self.description and self.description.get("proxied"))
