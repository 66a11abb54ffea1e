"""Finds the place in the stream at a time, without an index on times; and reads ages.

Positions, and eids within a channel, are dense and in the order of time, so a binary search looks
at about 30 rows, by their keys. The times are those at which transactions that sequence began. One
that had to wait for another has a slightly earlier time, so the result is exact to the time that
sequencing takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

#: Runs a query with parameters and returns its first row.
FetchRow = Callable[[str, list[Any]], "tuple[Any, ...] | None"]

_BY_POSITION = """
    SELECT position, sequenced_at FROM pg_eventstream_stream
     WHERE position >= %s ORDER BY position LIMIT 1
"""
_LAST_POSITION = """
    SELECT position FROM pg_eventstream_stream ORDER BY position DESC LIMIT 1
"""
_BY_EID = """
    SELECT eid, sequenced_at FROM pg_eventstream_stream
     WHERE channel = %s AND eid >= %s ORDER BY channel, eid LIMIT 1
"""
_LAST_EID = """
    SELECT eid FROM pg_eventstream_stream
     WHERE channel = %s ORDER BY channel DESC, eid DESC LIMIT 1
"""
_LOWEST = -(2**63)
_AGE = re.compile(r"([0-9]{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
# Keeps times in the range of Python's datetime and PostgreSQL's timestamp.
_OLDEST = timedelta(days=36_500)


def parse_age(text: str) -> timedelta | None:
    """The time that ``30s``, ``10m``, ``2h`` or ``7d`` means, up to 100 years; None otherwise."""
    age = _AGE.fullmatch(text)
    return min(timedelta(**{_UNITS[age[2]]: int(age[1])}), _OLDEST) if age else None


def first_since(fetch: FetchRow, moment: datetime, channel: str | None = None) -> int | None:
    """The first position that was sequenced at ``moment`` or later; None if there is none.

    With a ``channel``, the first of its eids.
    """
    of_channel = [] if channel is None else [channel]
    by_key, last_key = (_BY_POSITION, _LAST_POSITION) if channel is None else (_BY_EID, _LAST_EID)
    first = fetch(by_key, [*of_channel, _LOWEST])
    last = fetch(last_key, of_channel)
    if first is None or last is None:
        return None
    low, high = first[0], last[0] + 1
    while low < high:
        middle = (low + high) // 2
        found = fetch(by_key, [*of_channel, middle])
        if found is not None and found[1] < moment:
            low = found[0] + 1
        else:
            high = middle
    found = fetch(by_key, [*of_channel, low])
    return None if found is None else int(found[0])
