"""Where a reset leads: what a person writes, and the position that it means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Any, Final, Literal

from django.utils import timezone
from django.utils.dateparse import parse_date, parse_datetime

from .. import sse
from ..errors import EventStreamError, OperationRefused
from ..postgres.connector import fetch_one
from ..postgres.places import first_since, parse_age
from .checkpoints import EARLIEST, LATEST, Connection
from .event import event_id

_POSITION = re.compile(r"-?[0-9]{1,18}")
FORMS: Final = (
    "earliest, latest, an event's id (CHANNEL:NUMBER) or its position, an age (30s, 10m, 2h, 7d),"
    " or a time (2026-01-31 or 2026-01-31T12:00:00+01:00)"
)


@dataclass(frozen=True, slots=True)
class AfterEvent:
    """The place after an event."""

    channel: str
    number: int


#: ``int`` is the place after a position, ``timedelta`` an age.
Target = Literal["earliest", "latest"] | int | AfterEvent | timedelta | datetime


def parse_target(text: str) -> Target:
    """What ``--to`` means. A time without a zone is in Django's current time zone.

    Raises `OperationRefused` for anything else.
    """
    text = text.strip()
    if text == "earliest":
        return "earliest"
    if text == "latest":
        return "latest"
    if _POSITION.fullmatch(text):
        return int(text)
    if (age := parse_age(text)) is not None:
        return age
    if (moment := _parse_time(text)) is not None:
        return moment
    try:
        [(channel, number)] = sse.parse_id(text).items()
    except (EventStreamError, ValueError) as e:
        raise OperationRefused(f"{text!r} is no place in the stream. It can be: {FORMS}.") from e
    return AfterEvent(channel, number)


def _parse_time(text: str) -> datetime | None:
    try:
        moment = parse_datetime(text)
        if moment is None and (day := parse_date(text)) is not None:
            moment = datetime.combine(day, time())
    except ValueError as e:
        raise OperationRefused(f"{text!r} is no time: {e}.") from e
    if moment is not None and timezone.is_naive(moment):
        moment = timezone.make_aware(moment)
    return moment


def find_position(connection: Connection, target: Target) -> int:
    """The position after which a consumer continues.

    The pruner must be locked out (`PRUNE_LOCK`). Raises `OperationRefused` if the place is not in
    the stream: it is pruned, or was never reached.
    """
    (latest,) = fetch_one(connection, LATEST)
    match target:
        case "latest":
            return int(latest)
        case AfterEvent():
            return _after_event(connection, target)
    # Pruned rows that are not vacuumed are below it.
    (earliest,) = fetch_one(connection, EARLIEST)
    match target:
        case "earliest":
            return int(earliest)
        case int():
            if target > latest:
                raise OperationRefused(
                    f"Position {target:,} is not reached yet: the last one is {latest:,}. To"
                    " continue with what is sent from now on, use: --to latest"
                )
            if target < earliest:
                raise OperationRefused(_pruned(f"after position {target:,}", earliest))
            return target
        case datetime() | timedelta():
            return _at_time(connection, target, earliest, latest)


def _after_event(connection: Connection, target: AfterEvent) -> int:
    row = connection.execute(
        "SELECT position FROM pg_eventstream_stream"
        " WHERE channel = %s AND eid = %s AND eid + coalesce(incarnation, 0) = %s",
        [target.channel, target.number % sse.INCARNATION, target.number],
    ).fetchone()
    if row is None:
        raise OperationRefused(
            f"The event {event_id(target.channel, target.number)} is not stored: it was pruned, or"
            " was never sent. Use the id of another event, a position, a time, or: --to earliest"
        )
    return int(row[0])


def _at_time(
    connection: Connection, target: datetime | timedelta, earliest: int, latest: int
) -> int:
    def fetch(query: str, params: list[Any]) -> tuple[Any, ...] | None:
        return connection.execute(query, params).fetchone()

    if isinstance(target, timedelta):
        (now,) = fetch_one(connection, "SELECT statement_timestamp()")
        target = now - target
    assert isinstance(target, datetime)  # noqa: S101
    first = first_since(fetch, target)
    if first is None:
        return latest
    if first - 1 == earliest and earliest > 0:
        row = fetch_one(
            connection,
            "SELECT sequenced_at FROM pg_eventstream_stream WHERE position = %s",
            [first],
        )
        oldest = row[0].astimezone(target.tzinfo)
        raise OperationRefused(
            _pruned(f"since {target:%Y-%m-%d %H:%M:%S %Z}", earliest)
            + f" That one is from {oldest:%Y-%m-%d %H:%M:%S %Z}."
        )
    return first - 1


def _pruned(place: str, earliest: int) -> str:
    return (
        f"Not all events {place} are stored: those up to position {earliest:,} are pruned or never"
        " were. To continue with the oldest event that is stored, use: --to earliest"
    )
