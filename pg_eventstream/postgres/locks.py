"""The advisory locks, each a number in a key space that is the oid of the event table.

Locks on tables would not do: a lock that keeps other sessions out of a table also keeps vacuum out,
or waits for it.
"""

LOCK_SPACE = "'pg_eventstream_event'::regclass::oid::int4"

#: Held or requested by a publisher that is awake (`doorbell`), and by the publisher that leads.
BELL_LOCK, LEADER_LOCK = 1, 2

#: Held by a transaction that sequences or that prunes: one at a time.
SEQUENCE_LOCK, PRUNE_LOCK = 3, 4
