"""The advisory locks, each a number in a key space that is the oid of the event table.

Not locks of the tables that are written to: what keeps others out of a table keeps vacuum out of
it as well, or waits for it.
"""

LOCK_SPACE = "'pg_eventstream_event'::regclass::oid::int4"

#: Held, or waited for, by a publisher that is awake (`doorbell`), and by the one that leads.
BELL_LOCK, LEADER_LOCK = 1, 2

#: For the length of a transaction that sequences, or that prunes: one at a time.
SEQUENCE_LOCK, PRUNE_LOCK = 3, 4
