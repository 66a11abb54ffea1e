"""The queries of `state`. Each of them costs little on a large database, with any statistics.

None of them counts a whole table, and none reads the stream from its lower end, where vacuum might
not have removed what was pruned. They run on a standby as well.
"""

from __future__ import annotations

from ..postgres.locks import BELL_LOCK, LEADER_LOCK
from ..postgres.sequence import CURSOR
from ..postgres.sequence import WAITING as _WAITING

#: The application name of the sessions of publishers and of processes that stream without a proxy.
PUBLISHER_SESSION, HUB_SESSION = "pg_eventstream leader", "pg_eventstream hub"

#: The sessions that hold the leader's lock. `lead` explains the lock.
LEADERS = f"""
    SELECT pid FROM pg_locks
     WHERE locktype = 'advisory' AND granted AND mode = 'ExclusiveLock'
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
       AND classid = 'pg_eventstream_event'::regclass AND objid = {LEADER_LOCK}
       AND objsubid = 2
"""  # noqa: S608

SERVER = """
    SELECT clock_timestamp(), current_setting('server_version'), pg_is_in_recovery(),
           pg_notification_queue_usage()
"""

REPORTS = """
    SELECT name, content, extract(epoch FROM clock_timestamp() - at)::float8
      FROM pg_eventstream_report
"""

POSITION = f"SELECT position, incarnation FROM {CURSOR} AS c"  # noqa: S608

#: The number of waiting events, up to a limit, and the age of the oldest of these. The number is
#: null where the transaction ids in the tables are those of another cluster, until events are
#: sequenced.
WAITING = f"""
    WITH {_WAITING}
    SELECT CASE WHEN EXISTS (SELECT FROM c WHERE NOT known) THEN NULL ELSE count(*) END,
           extract(epoch FROM clock_timestamp() - min(coalesce(
               committed_at,
               (SELECT created FROM pg_eventstream_event WHERE id = event_id))))::float8
      FROM waiting
"""  # noqa: S608

#: How far each proxy is in the present stream (see `sequence.Cursor.valid`), how many sequenced
#: events it lacks, and the age of the oldest of these. Positions have no gaps.
PROXIES = f"""
    SELECT proxy.name, valid.position, coalesce(c.position, 0) - valid.position,
           (SELECT extract(epoch FROM clock_timestamp() - coalesce(committed_at, sequenced_at)
                   )::float8
              FROM pg_eventstream_stream AS s
             WHERE s.position > greatest(valid.position, %(pruned)s::bigint)
             ORDER BY s.position LIMIT 1)
      FROM pg_eventstream_proxy AS proxy
      LEFT JOIN {CURSOR} AS c ON true
     CROSS JOIN LATERAL (
           SELECT least(c.position,
                        CASE WHEN proxy.incarnation <> c.incarnation
                             THEN least(proxy.position, c.began) ELSE proxy.position END
                  ) AS position) AS valid
     ORDER BY proxy.name
"""  # noqa: S608

#: The sessions of publishers, and whether each holds the leader's lock. Columns that may not be
#: seen are null.
SESSIONS = f"""
    SELECT a.pid, coalesce(a.application_name, ''), host(a.client_addr), a.backend_start,
           lock.pid IS NOT NULL
      FROM pg_stat_activity AS a
      LEFT JOIN ({LEADERS}) AS lock ON lock.pid = a.pid
     WHERE lock.pid IS NOT NULL
        OR a.datname = current_database() AND a.application_name = '{PUBLISHER_SESSION}'
     ORDER BY a.pid
"""  # noqa: S608

#: Whether a publisher is awake, how many processes stream without a proxy, and the other databases
#: of this server that have publishers. `doorbell` explains the lock.
PROCESSES = f"""
    SELECT EXISTS (
               SELECT FROM pg_locks
                WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  AND classid = 'pg_eventstream_event'::regclass AND objid = {BELL_LOCK}
                  AND objsubid = 2),
           count(*) FILTER (WHERE datname = current_database()
                              AND application_name = '{HUB_SESSION}'),
           coalesce(array_agg(DISTINCT datname) FILTER (
               WHERE datname <> current_database()
                 AND application_name = '{PUBLISHER_SESSION}'), '{{}}')
      FROM pg_stat_activity
"""  # noqa: S608

#: Whether a role may put events in order. No row if there is no such role.
MAY_SEQUENCE = """
    SELECT has_function_privilege(oid, to_regprocedure('pg_eventstream_sequence()'), 'EXECUTE')
      FROM pg_roles WHERE rolname = %s
"""

#: What holds vacuum back in this database the most. Not the ``catalog_xmin`` of logical slots,
#: which concerns system tables only (PostgreSQL: src/backend/storage/ipc/procarray.c,
#: ComputeXidHorizons), nor vacuum itself.
OLDEST_TRANSACTION = """
    SELECT kind, name, seconds, transactions FROM (
        SELECT 'session' AS kind,
               pid || coalesce(' (' || nullif(application_name, '') || ')', '') AS name,
               extract(epoch FROM clock_timestamp() - xact_start)::float8 AS seconds,
               greatest(age(backend_xid), age(backend_xmin)) AS transactions
          FROM pg_stat_activity
         WHERE pid <> pg_backend_pid() AND datname = current_database()
           AND backend_type NOT IN ('autovacuum worker', 'walsender')
        UNION ALL
        SELECT 'prepared transaction', gid,
               extract(epoch FROM clock_timestamp() - prepared)::float8, age(transaction)
          FROM pg_prepared_xacts WHERE database = current_database()
        UNION ALL
        SELECT 'replication slot', slot_name, NULL, age(xmin) FROM pg_replication_slots
        UNION ALL
        SELECT 'standby', application_name, NULL, age(backend_xmin) FROM pg_stat_replication
    ) AS holders
     WHERE transactions IS NOT NULL
     ORDER BY transactions DESC, seconds DESC NULLS LAST LIMIT 1
"""

#: The age of the oldest event that is kept, and whether it may be pruned: see `Pruner`. Above what
#: the pruner has reported, because vacuum might not have removed what it pruned.
OLDEST_KEPT = """
    SELECT position, extract(epoch FROM clock_timestamp() - sequenced_at)::float8,
           NOT %(proxied)s OR position <= (SELECT max(position) FROM pg_eventstream_proxy)
      FROM pg_eventstream_stream
     WHERE position > %(pruned)s
     ORDER BY position LIMIT 1
"""

# Not the view pg_stat_user_tables, which looks at all tables of the database.
TABLES = """
    SELECT name, pg_total_relation_size(oid), pg_stat_get_live_tuples(oid),
           pg_stat_get_dead_tuples(oid),
           greatest(pg_stat_get_last_vacuum_time(oid), pg_stat_get_last_autovacuum_time(oid))
      FROM unnest(%s::text[]) WITH ORDINALITY AS wanted (name, nth)
     CROSS JOIN LATERAL (SELECT to_regclass(name)::oid AS oid) AS found
     WHERE oid IS NOT NULL
     ORDER BY nth
"""

# In one statement, so that all of it is from one moment: in any snapshot, an event that the trigger
# has seen waits or is in the stream, from its COMMIT until it is pruned. Ranges of keys are read,
# because a search from the end of an index would read everything that is not vacuumed.
_UNSEEN = f"""
    WITH {_WAITING}
    SELECT id FROM pg_eventstream_event WHERE id {{ids}}
    EXCEPT SELECT event_id FROM waiting
    EXCEPT SELECT event_id FROM pg_eventstream_stream
            WHERE position > greatest(%(pruned)s, (SELECT position FROM c) - %(part)s)
"""  # noqa: S608

#: The last id that was drawn for an event, and whether the role may see it.
LAST_ID = """
    SELECT pg_sequence_last_value(name), has_sequence_privilege(name, 'SELECT, USAGE')
      FROM CAST(pg_get_serial_sequence('pg_eventstream_event', 'id') AS regclass) AS name
"""

#: Those of the events above an id that are neither waiting nor in the newest part of the stream.
UNSEEN_NEAR = _UNSEEN.format(ids="> %(after)s")
#: Those of the given events that are not in a larger part either, nor among imported events, whose
#: positions are below 1.
UNSEEN_FAR = f"""
    {_UNSEEN.format(ids="= ANY(%(ids)s)")}
    EXCEPT SELECT event_id FROM pg_eventstream_stream
            WHERE position > greatest(%(pruned)s, -%(part)s) AND position < 1
"""  # noqa: S608
