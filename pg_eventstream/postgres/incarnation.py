"""Is this still the stream that we knew? Asked by all who remember their place in it.

A database may be emptied, restored or replaced under processes that go on. Their positions mean
nothing then, and a higher one would be waited for until as many events were sent as before.
"""

from __future__ import annotations

from typing import NamedTuple

#: One row of `Cursor`, all NULL before the first call of sequence() after tables were emptied.
#: For a LEFT JOIN, so that there is always a row.
CURSOR = """
    (SELECT position, incarnation, began, place
       FROM pg_eventstream_cursor ORDER BY position DESC LIMIT 1)
"""

#: Calls sequence(), and tells it what the caller knew (`Cursor.as_known`), so that it gives no id
#: twice in a database that took the place of the one that the caller knew.
SEQUENCE = "set_config('pg_eventstream.known', %s, true), pg_eventstream_sequence()"

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
