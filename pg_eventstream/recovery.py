"""What a client has missed, read from the stream. No lock, one index lookup per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from django.db import connections

from .conf import conf

# What one response holds, unless a single event is larger. Pages follow each other without
# delay, so they need not be long; short ones keep every process's memory flat.
PAGE_BYTES = 64_000
PAGE_EVENTS = 500


@dataclass(frozen=True, slots=True)
class RecoveredEvent:
    channel: str
    eid: int
    type: str
    data: str
    skip_user_ids: list[str]


@dataclass(frozen=True, slots=True)
class Recovered:
    """One page of what came after the ids asked for.

    ``start`` holds, per channel, the eid before the first event of the page; ``end`` the
    one after the last, to go on from. ``reset`` names the channels of which events are
    gone that the client should have had. ``more``: there is another page.
    """

    events: list[RecoveredEvent]
    start: dict[str, int]
    end: dict[str, int]
    reset: list[str]
    more: bool


def recover(after: Mapping[str, int | None]) -> Recovered:
    """The events after the eid given for each channel, in commit order over all of them.

    None stands for "from now on": a client that has seen nothing yet.
    """
    asked = {channel: eid for channel, eid in after.items() if eid is not None}
    # First the events, then how far they are pruned: whatever is not pruned by then was
    # there to be read. The other way round, a sweep in between could tear a hole.
    events, more = _page_after(asked)
    tips, pruned = _tips_and_pruned(list(after))

    # An id from the future (the database is back from a backup) is as gone as a pruned one.
    reset = [c for c, eid in asked.items() if eid < pruned[c] or eid > tips[c]]
    events = [event for event in events if event.channel not in reset]
    start = {c: tips[c] if eid is None or c in reset else eid for c, eid in after.items()}
    end = dict(start)
    for event in events:
        end[event.channel] = event.eid
    return Recovered(events, start, end, reset, more)


def _page_after(asked: Mapping[str, int]) -> tuple[list[RecoveredEvent], bool]:
    with connections[conf.database].cursor() as cursor:
        # Per channel one range of the index (channel, eid), as wide as a page since eids are
        # dense; then all are merged in commit order, and only what is on the page is looked
        # up by its key. LIMIT and OFFSET 0 keep the planner from turning these look-ups into
        # joins that read the tables from end to end, as it would after a burst that the
        # statistics do not know of yet. The running sum keeps the memory of a page bounded:
        # only a first event may be larger than that.
        cursor.execute(
            """
            SELECT channel, eid, type, data, skip_user_ids, found
              FROM (
                SELECT *, count(*) OVER () AS found, row_number() OVER by_position AS nth,
                       sum(octet_length(data)) OVER by_position AS bytes
                  FROM (
                    SELECT s.position, s.channel, s.eid, e.type, e.data, e.skip_user_ids
                      FROM (
                        SELECT s.*
                          FROM unnest(%(channels)s::text[], %(eids)s::bigint[])
                               AS asked (channel, eid)
                         CROSS JOIN LATERAL (
                               SELECT * FROM pg_eventstream_stream AS s
                                WHERE s.channel = asked.channel
                                  AND s.eid > asked.eid AND s.eid <= asked.eid + %(limit)s + 1
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
             ORDER BY position
            """,
            {
                "channels": list(asked),
                "eids": list(asked.values()),
                "limit": PAGE_EVENTS,
                "bytes": PAGE_BYTES,
            },
        )
        rows = cursor.fetchall()
    return [RecoveredEvent(*row[:-1]) for row in rows], bool(rows) and rows[0][-1] > len(rows)


def _tips_and_pruned(channels: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    with connections[conf.database].cursor() as cursor:
        cursor.execute(
            """
            SELECT asked.name, pg_eventstream_tip(asked.name), coalesce(known.pruned, 0)
              FROM unnest(%s::text[]) AS asked (name)
              LEFT JOIN pg_eventstream_channel AS known ON known.name = asked.name
            """,
            [channels],
        )
        rows = cursor.fetchall()
    return {name: tip for name, tip, _ in rows}, {name: pruned for name, _, pruned in rows}
