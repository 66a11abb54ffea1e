"""Reads the events that a client missed. It takes no lock and one index lookup per channel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, NamedTuple

from django.db import connections

from .. import sse, tracing
from ..conf import conf
from ..stream_event import StreamEvent

# The maximum of a page, unless a single event is larger. Pages follow each other without delay, so
# they can be short, which keeps the memory of processes low.
PAGE_BYTES = 64_000
PAGE_EVENTS = 500

#: Used instead of a number to begin with the oldest stored event.
EARLIEST: Final = -1
# Begin now. Not NULL, because the setting `array_nulls` can disable NULL in arrays.
_NOW = -2


@dataclass(frozen=True, slots=True)
class Page:
    """A page of events after the requested ids.

    For each channel, ``start`` has the number in the id before the first event of the page, and
    ``end`` the number after the last one, to continue from. ``reset`` names the channels whose next
    events are gone. ``more`` means that there is another page.
    """

    events: list[StreamEvent]
    start: dict[str, int]
    end: dict[str, int]
    reset: list[str]
    more: bool

    def visible_to(self, reader: str | None) -> Iterator[tuple[StreamEvent, sse.Place]]:
        """Yield each event that does not skip this user, and the place after it, which moves."""
        place = sse.Place(self.start)
        for event in self.events:
            place.move(event.channel, event.number)
            if reader not in event.skip_user_ids:
                yield event, place


def parse_start(last_event_id: str | None, channels: Iterable[str]) -> Mapping[str, int]:
    """Where to begin in each channel. Channels that are not in the result begin now.

    Raises `ResumeNotAllowed` and `InvalidRequest` as `sse.parse_id` does.
    """
    match (last_event_id or "").strip():
        case "":
            return {}
        case "earliest":
            return dict.fromkeys(channels, EARLIEST)
        case given:
            return sse.parse_id(given, channels)


def is_recovery(after: Mapping[str, int]) -> bool:
    """Whether a client that begins there has received events before."""
    return any(number != EARLIEST for number in after.values())


def replay(
    after: Mapping[str, int | None], limit: int = PAGE_EVENTS, max_age: timedelta | None = None
) -> Page:
    """The events after the given number of each channel, in commit order across the channels.

    The number None means to begin now, for a client that has received nothing yet, and `EARLIEST`
    means all stored events. Events that were sequenced longer ago than ``max_age`` count as pruned.
    """
    with tracing.span("recover") as set_attributes:
        page = _replay(after, limit, max_age)
        set_attributes(
            {
                "pg_eventstream.channels": len(after),
                "pg_eventstream.events": len(page.events),
                "pg_eventstream.reset": len(page.reset),
            }
        )
    return page


def _replay(after: Mapping[str, int | None], limit: int, max_age: timedelta | None) -> Page:
    channels, found, more = read_channels(after, limit, max_age)
    end = {c: channels[c].asked for c, number in after.items() if number is not None}
    # An id of a stream that was lost (the database was restored from a backup) is treated like a
    # pruned one, and so are all events after one that was deleted by hand.
    reset = {c for c in end if not channels[c].complete}
    for event in found:
        if event.prev == end[event.channel]:
            end[event.channel] = event.number
        else:
            reset.add(event.channel)
    if not more:
        reset.update(c for c in end if end[c] != channels[c].tip)
    start = {
        c: channels[c].asked if c in end and c not in reset else channels[c].tip for c in after
    }
    events = [event for event in found if event.channel not in reset]
    end = {c: start[c] if c in reset else end.get(c, start[c]) for c in after}
    return Page(events, start, end, [c for c in after if c in reset], more)


class ChannelPlace(NamedTuple):
    """The channel's newest number (0 for none), the requested one, and if all later are stored."""

    tip: int
    asked: int
    complete: bool


def read_channels(
    after: Mapping[str, int | None], limit: int, max_age: timedelta | None = None
) -> tuple[dict[str, ChannelPlace], list[StreamEvent], bool]:
    """The state of the channels, one page of their events, and whether there is another page."""
    # Rows with nth = 0 are the channels, the others the events.
    with connections[conf.database].cursor() as cursor:
        # One statement and therefore one snapshot: the pruner deletes events and records that in
        # the channel with one statement, so that no gap can appear in between. Above the eid up to
        # which the channel is recorded as pruned, its rows have no gap: if the first one exists,
        # all do.
        #
        # Each channel takes one range of the index (channel, eid), as wide as a page because eids
        # are dense. The ranges are merged in commit order, and only events of the page are looked
        # up by their keys. LIMIT and OFFSET 0 prevent the planner from turning these lookups into
        # joins that read whole tables, as it would with statistics from before a burst. The running
        # sum limits the size of a page: only a single first event can be larger.
        #
        # Eids are in the order of time, so a binary search finds the oldest event that is young
        # enough, with 20 lookups in a channel of a million events.
        cursor.execute(
            """
            WITH asked AS MATERIALIZED (
                SELECT channel, number, number %% %(incarnation)s AS eid, pruned, tip
                  FROM (
                    SELECT channel, pruned, coalesce(newest, last_pruned) AS tip,
                           CASE WHEN given.number = %(earliest)s
                                THEN coalesce((SELECT coalesce(prev,
                                                               eid - 1 + coalesce(incarnation, 0))
                                                 FROM pg_eventstream_stream AS s
                                                WHERE s.channel = given.channel AND s.eid > too_old
                                                ORDER BY eid LIMIT 1),
                                              newest, last_pruned)
                                ELSE nullif(given.number, %(now)s) END AS number
                      FROM unnest(%(channels)s::text[], %(numbers)s::bigint[])
                           AS given (channel, number)
                     CROSS JOIN LATERAL (
                           SELECT coalesce(max(pruned), 0) AS pruned,
                                  coalesce(max(pruned + incarnation), 0) AS last_pruned
                             FROM pg_eventstream_channel WHERE name = given.channel OFFSET 0
                         ) AS known
                     CROSS JOIN LATERAL (
                           SELECT (SELECT eid + coalesce(incarnation, 0)
                                     FROM pg_eventstream_stream AS s
                                    WHERE s.channel = given.channel AND s.eid > pruned
                                    ORDER BY eid DESC LIMIT 1) AS newest OFFSET 0
                         ) AS last
                     CROSS JOIN LATERAL (
                           SELECT CASE WHEN given.number = %(earliest)s
                                            AND %(max_age)s::float8 IS NOT NULL
                                       THEN (
                           WITH RECURSIVE search (low, high) AS (
                               SELECT pruned, coalesce(newest %% %(incarnation)s, pruned) + 1
                               UNION ALL
                               SELECT CASE WHEN old THEN s.eid ELSE low END,
                                      CASE WHEN old THEN high ELSE middle END
                                 FROM (SELECT *, (low + high) / 2 AS middle
                                         FROM search WHERE high - low > 1) AS halves
                                 LEFT JOIN LATERAL (
                                      SELECT s.eid,
                                             s.sequenced_at
                                             < now() - make_interval(secs => %(max_age)s) AS old
                                        FROM pg_eventstream_stream AS s
                                       WHERE s.channel = given.channel
                                         AND s.eid >= middle AND s.eid < high
                                       ORDER BY s.eid LIMIT 1
                                    ) AS s ON true
                           )
                           SELECT max(low) FROM search
                                       ) ELSE pruned END AS too_old OFFSET 0
                         ) AS limited
                  ) AS numbered
            )
            SELECT 0 AS nth, NULL AS position, channel, tip, NULL, NULL, NULL, NULL, number,
                   number = tip
                   OR eid >= pruned
                      AND (SELECT coalesce(s.prev, s.eid - 1 + coalesce(s.incarnation, 0))
                             FROM pg_eventstream_stream AS s
                            WHERE s.channel = asked.channel AND s.eid = asked.eid + 1
                              AND coalesce(s.sequenced_at
                                           >= now() - make_interval(secs => %(max_age)s), true)
                          ) = number
              FROM asked
            UNION ALL
            SELECT nth, position, channel, number, prev, type, data, skip_user_ids, found, NULL
              FROM (
                SELECT *, count(*) OVER () AS found, row_number() OVER by_position AS nth,
                       sum(octet_length(data)) OVER by_position AS bytes
                  FROM (
                    SELECT s.position, s.channel, s.eid + coalesce(s.incarnation, 0) AS number,
                           coalesce(s.prev, s.eid - 1 + coalesce(s.incarnation, 0)) AS prev,
                           e.type, e.data, e.skip_user_ids
                      FROM (
                        SELECT s.*
                          FROM asked
                         CROSS JOIN LATERAL (
                               SELECT * FROM pg_eventstream_stream AS s
                                WHERE s.channel = asked.channel
                                  AND s.eid > greatest(asked.eid, asked.pruned)
                                  AND s.eid <= asked.eid + %(limit)s + 1
                                ORDER BY s.eid LIMIT %(limit)s + 1
                             ) AS s
                         ORDER BY s.position LIMIT %(limit)s + 1
                      ) AS s
                     CROSS JOIN LATERAL (
                           SELECT * FROM pg_eventstream_event WHERE id = s.event_id OFFSET 0
                         ) AS e
                  ) AS merged
                WINDOW by_position AS (ORDER BY position)
              ) AS measured
             WHERE nth = 1 OR (nth <= %(limit)s AND bytes <= %(bytes)s)
             ORDER BY nth
            """,
            {
                "channels": list(after),
                "numbers": [_NOW if number is None else number for number in after.values()],
                "earliest": EARLIEST,
                "now": _NOW,
                "incarnation": sse.INCARNATION,
                "limit": limit,
                # As a number: PostgreSQL 14 refuses texts of more than 2**31 seconds.
                "max_age": None if max_age is None else max_age.total_seconds(),
                "bytes": PAGE_BYTES,
            },
        )
        rows = cursor.fetchall()
    channels = {row[2]: ChannelPlace(row[3], row[8], bool(row[9])) for row in rows[: len(after)]}
    page = rows[len(after) :]
    events = [StreamEvent(*row[1:8]) for row in page]
    return channels, events, bool(page) and page[0][8] > len(page)
