"""The 16 slots of a consumer: the channels are distributed among them by a hash.

The events of a channel are all in one slot, so they stay in order however slots are shared. A
channel's slot never changes: SHA-256 is the same in every version of PostgreSQL, which
``hashtext()`` need not be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from .sequence import CURSOR

SLOTS = 16

# As `channels.RESERVED`.
_RESERVED = "pg_eventstream:"

#: A consumer's checkpoints: the row with the highest key of each slot.
CHECKPOINTS = f"""
    (SELECT checkpoint.*
       FROM generate_series(0, {SLOTS - 1}) AS of (slot)
      CROSS JOIN LATERAL (
            SELECT * FROM pg_eventstream_checkpoint
             WHERE consumer_id = {{consumer_id}} AND slot = of.slot
             ORDER BY epoch DESC, position DESC LIMIT 1) AS checkpoint)
"""  # noqa: S608

#: All slots of all consumers, with the position up to which each has handled the present stream:
#: its checkpoint, or less if that belongs to another stream (`sequence.Cursor.valid`).
HANDLED = f"""
    (SELECT k.id AS consumer_id, k.name, k.channels, k.prefixes, c.slot, c.position AS checkpoint,
            least(c.position, coalesce(present.position, 0),
                  CASE WHEN c.incarnation <> coalesce(present.incarnation, 0)
                       THEN coalesce(present.began, 0) END) AS position
       FROM pg_eventstream_consumer AS k
      CROSS JOIN LATERAL {CHECKPOINTS.format(consumer_id="k.id")} AS c
       LEFT JOIN {CURSOR} AS present ON true)
"""  # noqa: S608
#: The position up to which all consumers have handled everything. Null if there is no consumer.
HANDLED_BY_ALL = f"SELECT min(position) FROM {HANDLED} AS handled"  # noqa: S608


@lru_cache(maxsize=65_536)
def slot_of(channel: str) -> int:
    """The slot of a channel, 0 to 15."""
    return hashlib.sha256(channel.encode()).digest()[0] % SLOTS


def slot_sql(channel: str) -> str:
    """The same in SQL, for a column."""
    return f"mod(get_byte(sha256(convert_to({channel}, 'UTF8')), 0), {SLOTS})"


def follows(channel: str, channels: Sequence[str], prefixes: Sequence[str]) -> bool:
    """Whether a consumer handles a channel, if that is reliable. Without both, it handles all."""
    if channel.startswith(_RESERVED):
        return False
    named = channel in channels or channel.startswith(tuple(prefixes) or ("\r",))
    return named or not (channels or prefixes)


def follows_sql(channel: str, channels: str, prefixes: str) -> str:
    """The same in SQL.

    ``channels`` and ``prefixes`` are arrays of text, both empty for all channels. Reserved channels
    are never handled.
    """
    return f"""
        (NOT starts_with({channel}, '{_RESERVED}')
         AND ({channel} = ANY({channels})
              OR {channels} = '{{}}' AND {prefixes} = '{{}}'
              OR EXISTS (SELECT FROM unnest({prefixes}) AS prefix
                          WHERE starts_with({channel}, prefix))))
    """
