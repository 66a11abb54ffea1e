-- Generated from pg_eventstream/migrations/0005_incarnation.py. Do not edit.
-- Again with: python -m migrations.generate
-- How to apply it, and which route to take: migrations/README.md

BEGIN;
--
-- Add field incarnation to cursor
--
ALTER TABLE "pg_eventstream_cursor" ADD COLUMN "incarnation" bigint DEFAULT 0 NOT NULL;
--
-- Add field began to cursor
--
ALTER TABLE "pg_eventstream_cursor" ADD COLUMN "began" bigint DEFAULT 0 NOT NULL;
--
-- Add field place to cursor
--
ALTER TABLE "pg_eventstream_cursor" ADD COLUMN "place" text DEFAULT '' NOT NULL;
--
-- Add field incarnation to proxy
--
ALTER TABLE "pg_eventstream_proxy" ADD COLUMN "incarnation" bigint DEFAULT 0 NOT NULL;
--
-- Raw SQL operation
--
INSERT INTO pg_eventstream_cursor (position, snapshot, cluster)
SELECT 0, pg_current_snapshot(), 0
 WHERE NOT EXISTS (SELECT FROM pg_eventstream_cursor);
--
-- Raw SQL operation
--
-- pg_eventstream_sequence(): gives every event committed since the last call its
-- position (global order) and eid (dense counter of its channel), in commit
-- order. Returns how many events it sequenced.
--
-- Which events are new is decided by comparing two snapshots, the one stored by
-- the last call and the present one, and not by a high-water mark: a transaction
-- that commits late simply arrives in the next call, and one that stays open
-- holds nothing up. The cost depends on the new rows alone, not on other transactions.
--
-- Any number of sessions may call it; one at a time works.
--
-- It also notices when the stream may have lost events whose ids clients hold, and
-- begins a new incarnation of it then: ids go on above a random multiple of 10^12,
-- so that no id is used twice. Eids and positions go on where they are.
CREATE OR REPLACE FUNCTION pg_eventstream_sequence() RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
-- The plan must not hang on statistics: after a burst they still say that the
-- outbox is empty, and the generic estimate for "xid >= ?" is a third of it.
SET enable_seqscan = off
SET plan_cache_mode = force_generic_plan
SET jit = off
AS $$
DECLARE
    last     pg_eventstream_cursor;
    cluster_ bigint;
    place_   text;
    same     boolean;
    known    boolean;
    cur      pg_snapshot;
    own      xid8;
    moved    bigint;
    -- What a caller that lives long knew of the cursor: incarnation, position, place.
    caller   text[] := string_to_array(current_setting('pg_eventstream.known', true), ' ');
BEGIN
    -- Each statement below must see what the previous holder of the lock
    -- committed; only READ COMMITTED takes a new snapshot per statement.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'pg_eventstream_sequence() needs a READ COMMITTED transaction'
            USING ERRCODE = 'invalid_transaction_state',
                  HINT = 'Call it outside a transaction block.';
    END IF;

    -- Conflicts with itself, not with readers. Unlike a row lock it writes
    -- nothing: an empty call needs no transaction id and no WAL.
    LOCK TABLE pg_eventstream_cursor IN SHARE ROW EXCLUSIVE MODE;

    -- One row, whose key moves with every write: read from the upper end of the
    -- index it is found at once, however many dead versions lie below.
    SELECT * INTO last FROM pg_eventstream_cursor ORDER BY position DESC LIMIT 1;

    -- Where we are: a copy of a database has another oid, a table that was emptied or
    -- restored another file, and a standby that was promoted another timeline, as has a
    -- cluster that was recovered from a backup. (pg_control_checkpoint() would tell of the
    -- new timeline only after the next checkpoint.) The cluster says whether transaction
    -- ids mean anything here, so it comes first.
    SELECT system_identifier,
           format('%s/%s/%s/%s',
                  (SELECT oid FROM pg_database WHERE datname = current_database()),
                  pg_relation_filenode('pg_eventstream_event'),
                  pg_relation_filenode('pg_eventstream_stream'),
                  left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))
      INTO cluster_, place_
      FROM pg_control_system();

    -- The first call after the migration finds no place yet, and takes the one it is in.
    same := last.place = place_ AND last.cluster = cluster_
            OR last.place = '' AND last.cluster IN (0, cluster_);

    -- The caller's own transaction, if it has written before: what it commits belongs to a
    -- later call.
    own := pg_current_xact_id_if_assigned();

    -- After pg_dump and restore, pg_upgrade or a logical copy the transaction ids
    -- that are stored belong to another cluster and mean nothing, and a table that was emptied
    -- may have been filled again with rows that are sequenced already. Then, as on the
    -- very first call, new is what stands in the outbox and not in the stream. A promoted
    -- standby goes on with the ids of its primary.
    known := coalesce(
        last.cluster = cluster_
        AND (same OR regexp_replace(last.place, '[^/]*$', '')
                     = regexp_replace(place_, '[^/]*$', ''))
        AND pg_snapshot_xmax(last.snapshot) <= pg_snapshot_xmax(pg_current_snapshot()),
        false);
    -- A channel whose newest event is pruned is written down, so where there is neither, rows
    -- were deleted by hand. And the database may be another one of the same name.
    same := coalesce(
        same AND (known OR last.cluster = 0)
        AND (last.incarnation::text = caller[1]
             AND (last.position < caller[2]::bigint
                  OR caller[3] <> '' AND last.place <> caller[3])) IS NOT TRUE
        AND (last.position = 0
             OR EXISTS (SELECT FROM pg_eventstream_stream s WHERE s.position = last.position)
             OR EXISTS (SELECT FROM pg_eventstream_channel)),
        false);

    IF NOT known THEN
        -- The cursor may be older than the stream, or gone.
        SELECT greatest(last.position, max(position), 0) INTO last.position
          FROM pg_eventstream_stream;
        DELETE FROM pg_eventstream_cursor;
    END IF;
    IF NOT same THEN
        last.began := last.position;
        -- Another one than before. Not random(), which whoever calls this may have seeded.
        last.incarnation := 1000000000000 * (1 + (coalesce(last.incarnation, 0) / 1000000000000
            + abs(hashtextextended(gen_random_uuid()::text, 0) % 999998)) % 999999);
    END IF;

    -- One statement, hence one snapshot: the one it reads with is the one that is
    -- stored, and no commit can fall between the two.
    WITH
    fresh AS MATERIALIZED (
        SELECT seq, event_id, channel
          FROM pg_eventstream_outbox
         WHERE known AND xid >= pg_snapshot_xmax(last.snapshot)
           AND pg_visible_in_snapshot(xid, (SELECT pg_current_snapshot()))
           AND xid IS DISTINCT FROM own
        UNION ALL
        -- OFFSET 0: looked up one by one. As a join it might be planned as a walk over the
        -- whole outbox, with all that is dead there and not vacuumed.
        SELECT o.seq, o.event_id, o.channel
          FROM pg_snapshot_xip(last.snapshot) AS unfinished,
               LATERAL (SELECT seq, event_id, channel FROM pg_eventstream_outbox
                         WHERE xid = unfinished OFFSET 0) AS o
         WHERE known
           AND pg_visible_in_snapshot(unfinished, (SELECT pg_current_snapshot()))
           AND unfinished IS DISTINCT FROM own
        UNION ALL
        -- pg_restore --data-only lets the trigger fire for what the outbox gets anyway;
        -- the higher number is then the one that was drawn at the event's own COMMIT
        SELECT max(o.seq), o.event_id, o.channel
          FROM pg_eventstream_outbox o
         WHERE NOT known
           AND EXISTS (SELECT FROM pg_eventstream_event e WHERE e.id = o.event_id)
           AND NOT EXISTS (SELECT FROM pg_eventstream_stream s WHERE s.event_id = o.event_id)
         GROUP BY o.event_id, o.channel
    ),
    forgotten AS (
        -- ids of another cluster must never be compared with ids of this one
        DELETE FROM pg_eventstream_outbox WHERE NOT known
    ),
    tip AS MATERIALIZED (
        -- The newest event of the channel, eid 0 if it never had one. Known from the
        -- stream or, when the sweep has emptied that, from what the sweep wrote down. No
        -- counter is updated per event, so nothing here slows down while an old snapshot
        -- keeps dead rows from being vacuumed.
        SELECT named.channel, newest.eid, newest.incarnation
          FROM (SELECT DISTINCT channel FROM fresh) AS named
         CROSS JOIN LATERAL (
               (SELECT s.eid, coalesce(s.incarnation, 0) AS incarnation
                  FROM pg_eventstream_stream s
                 WHERE s.channel = named.channel ORDER BY s.eid DESC LIMIT 1)
               UNION ALL
               (SELECT c.pruned, c.incarnation
                  FROM pg_eventstream_channel c WHERE c.name = named.channel)
               UNION ALL
               SELECT 0, 0
               ORDER BY eid DESC LIMIT 1
             ) AS newest
    ),
    numbered AS (
        INSERT INTO pg_eventstream_stream (position, channel, eid, event_id, incarnation, prev)
        SELECT last.position + row_number() OVER (ORDER BY seq),
               channel,
               tip.eid + row_number() OVER of_channel,
               event_id,
               nullif(last.incarnation, 0),
               CASE WHEN tip.incarnation <> last.incarnation AND row_number() OVER of_channel = 1
                    THEN tip.eid + tip.incarnation END
          FROM fresh JOIN tip USING (channel)
        WINDOW of_channel AS (PARTITION BY channel ORDER BY seq)
    )
    SELECT count(*), pg_current_snapshot() INTO moved, cur FROM fresh;

    -- A snapshot lists all transactions that are unfinished but the one that takes it.
    IF own < pg_snapshot_xmax(cur) THEN
        cur := format('%s:%s:%s', pg_snapshot_xmin(cur), pg_snapshot_xmax(cur),
                      (SELECT string_agg(xid::text, ',' ORDER BY xid)
                         FROM (SELECT own UNION SELECT pg_snapshot_xip(cur)) AS unfinished (xid)));
    END IF;

    IF moved > 0 OR NOT known OR NOT same OR last.place <> place_ THEN
        DELETE FROM pg_eventstream_cursor WHERE position = last.position;
        INSERT INTO pg_eventstream_cursor (position, snapshot, cluster, incarnation, began, place)
        VALUES (last.position + moved, cur, cluster_, last.incarnation, last.began, place_);
    END IF;
    IF moved > 0 THEN
        -- A client may soon have seen these ids, so no crash and no failover may take them
        -- back, nor the events, whose commits precede this one in the WAL: however the
        -- database is set up, and whatever the senders wait for.
        IF current_setting('synchronous_commit') <> 'remote_apply' THEN
            PERFORM set_config('synchronous_commit', 'on', true);
        END IF;
    END IF;
    IF moved > 0 OR NOT same THEN
        -- For those who stream to clients by themselves; nothing to do with the doorbell.
        PERFORM pg_notify('pg_eventstream_news', '');
    END IF;
    RETURN moved;
END
$$;

-- It finds its tables in the schema that it was created in, and nothing that a
-- caller put in the way: pg_temp stands last, so that no temporary table can
-- take a table's place.
DO $$
BEGIN
    EXECUTE format(
        'ALTER FUNCTION pg_eventstream_sequence() SET search_path = pg_catalog, %I, pg_temp',
        current_schema());
END
$$;

COMMIT;
