"""Puts committed events in order, and tells how far the order is.

A database may be emptied, restored or replaced while processes run. The positions that they
remember mean nothing then, and a process would wait for a higher one until as many events were
sent as before. So whoever remembers a position compares the `Cursor` as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg

from .connector import fetch_one

Connection = psycopg.Connection[Any]

#: One row of `Cursor`, all NULL before the first call of sequence() after tables were emptied.
#: For a LEFT JOIN, so that there is always a row.
CURSOR = """
    (SELECT position, incarnation, began, place
       FROM pg_eventstream_cursor ORDER BY position DESC LIMIT 1)
"""

#: Calls sequence(), and tells it what the caller knew (`Cursor.as_known`), so that it gives no id
#: twice in a database that took the place of the one that the caller knew.
SEQUENCE = "set_config('pg_eventstream.known', %s, true), pg_eventstream_sequence()"

#: With it, the cursor as it was before: another process that sequences wakes no feed.
SEQUENCE_AND_LOOK = f"""
    SELECT {SEQUENCE}, c.*
      FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true
"""  # noqa: S608

#: For the log.
ANOTHER_STREAM = (
    "the stream is not the one that it was before (its database was emptied, restored or replaced,"
    " or a standby was promoted)"
)


class Cursor(NamedTuple):
    """How far the stream is, and which it is: see `models.Cursor`."""

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
        """Whether what was known is still true, and this the same stream a little later."""
        return (
            self.incarnation == known.incarnation
            and self.position >= known.position
            and known.place in ("", self.place)
        )

    @property
    def as_known(self) -> str:
        return f"{self.incarnation} {self.position} {self.place}"

    def valid(self, position: int, incarnation: int) -> int:
        """Up to where this stream is what it was at that position of an incarnation."""
        if incarnation != self.incarnation:
            position = min(position, self.began)
        return min(position, self.position)


#: Before the first look.
UNKNOWN = Cursor(0, 0, 0, "")


def sequence(connection: Connection) -> int:
    """Give the events committed since the last call their order; returns how many.

    A backlog takes several calls: until one returns 0. Durable when this returns: what a client may
    have seen keeps its id across a crash.
    """
    return sequence_and_look(connection, UNKNOWN)[0]


def sequence_and_look(connection: Connection, known: Cursor) -> tuple[int, Cursor]:
    """How many events were sequenced, and the cursor before."""
    row = fetch_one(connection, SEQUENCE_AND_LOOK, [known.as_known])
    return int(row[1]), Cursor.of(*row[2:])


def sequence_all(connection: Connection) -> Iterator[int]:
    """Sequence what is committed by now, and some of what is committed meanwhile.

    Yields how many events each call has sequenced.
    """
    (snapshot,) = fetch_one(connection, "SELECT pg_current_snapshot()::text")
    while True:
        sequenced = sequence(connection)
        yield sequenced
        if not sequenced or _is_sequenced(connection, snapshot):
            return


def _is_sequenced(connection: Connection, snapshot: str) -> bool:
    """Whether all is sequenced that is visible in the snapshot."""
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


def last_position(connection: Connection) -> int:
    """The position of the newest event in the stream, 0 if there was none yet."""
    (position,) = fetch_one(connection, f"SELECT max(position) FROM {CURSOR} AS c")  # noqa: S608
    return int(position or 0)
