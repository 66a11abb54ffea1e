"""The 16 slots of a consumer: the channels are distributed among them by a hash.

The events of a channel are all in one slot, so they stay in order however slots are shared. A
channel's slot never changes: SHA-256 is the same in every version of PostgreSQL, which
``hashtext()`` need not be.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

SLOTS = 16


@lru_cache(maxsize=65_536)
def slot_of(channel: str) -> int:
    """The slot of a channel, 0 to 15."""
    return hashlib.sha256(channel.encode()).digest()[0] % SLOTS


def slot_sql(channel: str) -> str:
    """The same in SQL, for a column."""
    return f"mod(get_byte(sha256(convert_to({channel}, 'UTF8')), 0), {SLOTS})"


def follows_sql(channel: str, channels: str, prefixes: str) -> str:
    """Whether a consumer handles a channel, in SQL.

    ``channels`` and ``prefixes`` are arrays of text, both empty for all channels. Reserved channels
    are never handled.
    """
    return f"""
        (NOT starts_with({channel}, 'pg_eventstream:')
         AND ({channel} = ANY({channels})
              OR {channels} = '{{}}' AND {prefixes} = '{{}}'
              OR EXISTS (SELECT FROM unnest({prefixes}) AS prefix
                          WHERE starts_with({channel}, prefix))))
    """
