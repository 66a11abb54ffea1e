"""Puts committed events in order, and identifies the stream that positions belong to.

A database can be emptied, restored or replaced while processes run. The positions that they
remember are then invalid, and a process would wait for a higher one until as many events were sent
as before. So code that remembers a position also compares the `Cursor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg

from .connector import fetch_one
from .locks import LEADER_LOCK, LOCK_SPACE

Connection = psycopg.Connection[Any]

#: The row of `Cursor`. Until the first call of sequence() after the tables were emptied there is
#: none, so queries use a LEFT JOIN.
CURSOR = """
    (SELECT position, incarnation, began, place
       FROM pg_eventstream_cursor ORDER BY position DESC LIMIT 1)
"""

#: Calls sequence() and passes the cursor that the caller knew (`Cursor.as_known`), so that no id is
#: used twice in a database that has replaced the one that the caller knew.
SEQUENCE = "set_config('pg_eventstream.known', %s, true), pg_eventstream_sequence()"

# A publisher that leads holds this lock exclusively.
HAS_NO_LEADER = f"pg_try_advisory_xact_lock_shared({LOCK_SPACE}, {LEADER_LOCK})"
#: The same, if no publisher leads. Otherwise no row.
SEQUENCE_UNLESS_LED = f"SELECT {SEQUENCE} WHERE {HAS_NO_LEADER}"

#: Also returns the cursor before the call, which shows events that another process has sequenced.
SEQUENCE_AND_LOOK = f"""
    SELECT {SEQUENCE}, c.*
      FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true
"""  # noqa: S608

#: For the log.
ANOTHER_STREAM = (
    "the stream is not the same as before (its database was emptied, restored or replaced, or a"
    " standby was promoted)"
)


class Cursor(NamedTuple):
    """The end of the stream, and its identity: see `models.Cursor`."""

    position: int
    incarnation: int
    began: int
    place: str

    @classmethod
    def of(
        cls, position: int | None, incarnation: int | None, began: int | None, place: str | None
    ) -> Cursor:
        return cls(position or 0, incarnation or 0, began or 0, place or "")

    def follows(self, known: Cursor) -> bool:
        """Whether this is the same stream as the known one, possibly at a later time."""
        return (
            self.incarnation == known.incarnation
            and self.position >= known.position
            and known.place in ("", self.place)
        )

    @property
    def as_known(self) -> str:
        return f"{self.incarnation} {self.position} {self.place}"

    def valid(self, position: int, incarnation: int) -> int:
        """The position up to which this stream equals the given incarnation at ``position``."""
        if incarnation != self.incarnation:
            position = min(position, self.began)
        return min(position, self.position)


#: Before the first look.
UNKNOWN = Cursor(0, 0, 0, "")


def sequence(connection: Connection) -> int:
    """Sequence the events committed since the last call. Returns their number.

    A backlog takes several calls, until one returns 0. The result is durable when this returns: an
    event that a client has seen keeps its id across a crash.
    """
    return sequence_and_look(connection, UNKNOWN)[0]


def sequence_and_look(connection: Connection, known: Cursor) -> tuple[int, Cursor]:
    """Sequence events. Returns their number and the cursor before the call."""
    row = fetch_one(connection, SEQUENCE_AND_LOOK, [known.as_known])
    return int(row[1]), Cursor.of(*row[2:])


def sequence_all(connection: Connection) -> Iterator[int]:
    """Sequence all events committed by now, and some that are committed in the meantime.

    Yields the number of events that each call has sequenced.
    """
    (snapshot,) = fetch_one(connection, "SELECT pg_current_snapshot()::text")
    while True:
        sequenced = sequence(connection)
        yield sequenced
        if not sequenced or _is_sequenced(connection, snapshot):
            return


def _is_sequenced(connection: Connection, snapshot: str) -> bool:
    """Whether all events that are visible in the snapshot are sequenced."""
    row = connection.execute(
        """
        SELECT pg_snapshot_xmax(snapshot) >= pg_snapshot_xmax(%(snapshot)s::pg_snapshot)
               AND NOT EXISTS (SELECT FROM pg_snapshot_xip(snapshot) AS unfinished
                                WHERE pg_visible_in_snapshot(unfinished, %(snapshot)s))
          FROM pg_eventstream_cursor ORDER BY position DESC LIMIT 1
        """,
        {"snapshot": snapshot},
    ).fetchone()
    return bool(row and row[0])


def reached(connection: Connection, snapshot: str) -> int | None:
    """The last position, if all events that are visible in the snapshot are sequenced.

    None if some are not. It needs no right to sequence, and reads little: the conditions are those
    of pg_eventstream_sequence().
    """
    is_waiting, position = fetch_one(connection, _REACHED, {"snapshot": snapshot})
    return None if is_waiting else int(position or 0)


_REACHED = """
    WITH c AS MATERIALIZED (
        SELECT position, snapshot, until, done,
               cluster = (SELECT system_identifier FROM pg_control_system()) AS known
          FROM pg_eventstream_cursor ORDER BY position DESC LIMIT 1
    )
    SELECT EXISTS (SELECT FROM c WHERE NOT known)
           OR EXISTS (
              SELECT FROM c CROSS JOIN LATERAL pg_snapshot_xip(c.snapshot) AS part (xid)
               CROSS JOIN LATERAL (
                     SELECT FROM pg_eventstream_outbox
                      WHERE xid = part.xid
                        AND seq > CASE WHEN pg_visible_in_snapshot(part.xid, c.until)
                                       THEN c.done ELSE 0 END
                      OFFSET 0) AS o
               WHERE pg_visible_in_snapshot(part.xid, %(snapshot)s::pg_snapshot))
           OR EXISTS (
              SELECT FROM c CROSS JOIN LATERAL (
                     SELECT xid FROM pg_eventstream_outbox
                      WHERE xid >= pg_snapshot_xmax(c.snapshot) ORDER BY xid, seq OFFSET 0) AS o
               WHERE pg_visible_in_snapshot(o.xid, %(snapshot)s::pg_snapshot))
           OR NOT EXISTS (SELECT FROM c) AND EXISTS (
              SELECT FROM pg_eventstream_outbox
               WHERE pg_visible_in_snapshot(xid, %(snapshot)s::pg_snapshot)),
           (SELECT position FROM c)
"""


def last_position(connection: Connection) -> int:
    """The position of the newest event in the stream; 0 if there was none yet."""
    (position,) = fetch_one(connection, f"SELECT max(position) FROM {CURSOR} AS c")  # noqa: S608
    return int(position or 0)


#: A WITH clause for the events that are committed and not sequenced, up to a limit. The conditions
#: are those of pg_eventstream_sequence().
WAITING = """
    c AS MATERIALIZED (
        SELECT position, snapshot, until, done,
               cluster = (SELECT system_identifier FROM pg_control_system()) AS known
          FROM pg_eventstream_cursor ORDER BY position DESC LIMIT 1
    ),
    waiting AS MATERIALIZED (
        (SELECT o.event_id, o.channel, o.committed_at
           FROM c CROSS JOIN LATERAL pg_snapshot_xip(c.snapshot) AS part (xid)
          CROSS JOIN LATERAL (
                SELECT * FROM pg_eventstream_outbox
                 WHERE xid = part.xid
                   AND seq > CASE WHEN pg_visible_in_snapshot(part.xid, c.until)
                                  THEN c.done ELSE 0 END
                 OFFSET 0) AS o
          WHERE known)
        UNION ALL
        (SELECT o.event_id, o.channel, o.committed_at
           FROM c CROSS JOIN LATERAL (
                SELECT * FROM pg_eventstream_outbox
                 WHERE xid >= pg_snapshot_xmax(c.snapshot) ORDER BY xid, seq OFFSET 0) AS o
          WHERE known)
        UNION ALL
        (SELECT event_id, channel, committed_at FROM pg_eventstream_outbox
          WHERE NOT EXISTS (SELECT FROM c) ORDER BY xid, seq)
        LIMIT %(most)s
    )
"""
