"""The advisory locks, each a number in a key space that is the oid of the event table.

Locks on tables would not do: a lock that keeps other sessions out of a table also keeps vacuum out,
or waits for it.
"""

LOCK_SPACE = "'pg_eventstream_event'::regclass::oid::int4"

#: Held or requested by a publisher that is awake (`doorbell`), and by the publisher that leads.
BELL_LOCK, LEADER_LOCK = 1, 2

#: Held by a transaction that sequences or that prunes: one at a time.
SEQUENCE_LOCK, PRUNE_LOCK = 3, 4

#: Above this are the locks of consumers, 32 numbers for each: `consumer_lock`.
_CONSUMERS = 64
_PER_CONSUMER = 32
#: Held in share mode by each process that runs the consumer. Below it are its slots.
MEMBER = 16


def consumer_lock(consumer_id: int, slot: int) -> int:
    """The lock that a process holds while it handles the events of a slot, or `MEMBER`."""
    return _CONSUMERS + _PER_CONSUMER * consumer_id + slot


def owner_of(lock: int) -> tuple[int, int]:
    """The consumer and the slot of `consumer_lock`."""
    return divmod(lock - _CONSUMERS, _PER_CONSUMER)


#: The locks of all consumers that sessions hold, and the pids of these.
CONSUMER_LOCKS = f"""
    (SELECT objid::bigint AS lock, pid
       FROM pg_locks
      WHERE locktype = 'advisory' AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND classid = 'pg_eventstream_event'::regclass AND objid >= {consumer_lock(0, 0)}
        AND objsubid = 2)
"""  # noqa: S608
