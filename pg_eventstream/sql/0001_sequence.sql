-- pg_eventstream_sequence(): gives every event committed since the last call its
-- position (global order) and eid (dense counter of its channel), in commit
-- order. Returns how many events it sequenced.
--
-- Which events are new is decided by comparing two snapshots, the one stored by
-- the last call and the present one, and not by a high-water mark: a transaction
-- that commits late simply arrives in the next call, and one that stays open
-- holds nothing up. The cost is that of the new rows, whatever runs beside it.
--
-- Any number of sessions may call it; one at a time works.
CREATE FUNCTION pg_eventstream_sequence() RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
-- The plan must not hang on statistics: after a burst they still say that the
-- outbox is empty, and the generic estimate for "xid >= ?" is a third of it.
SET enable_seqscan = off
SET plan_cache_mode = force_generic_plan
SET jit = off
AS $$
DECLARE
    last  pg_eventstream_cursor;
    here  bigint;
    known boolean;
    cur   pg_snapshot;
    own   xid8;
    moved bigint;
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
    SELECT system_identifier INTO here FROM pg_control_system();

    -- The caller's own transaction, if it has written before: what it commits belongs to a
    -- later call.
    own := pg_current_xact_id_if_assigned();

    -- After pg_dump and restore, pg_upgrade or a logical copy the transaction ids
    -- that are stored belong to another cluster and mean nothing. Then, as on the
    -- very first call, new is what stands in the outbox and not in the stream.
    known := coalesce(
        last.cluster = here
        AND pg_snapshot_xmax(last.snapshot) <= pg_snapshot_xmax(pg_current_snapshot()),
        false);

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
        -- The eid of the newest event of the channel, 0 if it never had one. Known from the
        -- stream or, when the sweep has emptied that, from what the sweep wrote down. No
        -- counter is updated per event, so nothing here slows down while an old snapshot
        -- keeps dead rows from being vacuumed.
        SELECT channel,
               greatest(
                   (SELECT s.eid FROM pg_eventstream_stream s
                     WHERE s.channel = named.channel ORDER BY s.eid DESC LIMIT 1),
                   (SELECT c.pruned FROM pg_eventstream_channel c WHERE c.name = named.channel),
                   0) AS eid
          FROM (SELECT DISTINCT channel FROM fresh) AS named
    ),
    numbered AS (
        INSERT INTO pg_eventstream_stream (position, channel, eid, event_id)
        SELECT coalesce(last.position, 0) + row_number() OVER (ORDER BY seq),
               channel,
               tip.eid + row_number() OVER (PARTITION BY channel ORDER BY seq),
               event_id
          FROM fresh JOIN tip USING (channel)
    )
    SELECT count(*), pg_current_snapshot() INTO moved, cur FROM fresh;

    -- A snapshot lists all transactions that are unfinished but the one that takes it.
    IF own < pg_snapshot_xmax(cur) THEN
        cur := format('%s:%s:%s', pg_snapshot_xmin(cur), pg_snapshot_xmax(cur),
                      (SELECT string_agg(xid::text, ',' ORDER BY xid)
                         FROM (SELECT own UNION SELECT pg_snapshot_xip(cur)) AS unfinished (xid)));
    END IF;

    IF moved > 0 OR NOT known THEN
        DELETE FROM pg_eventstream_cursor WHERE position = last.position;
        INSERT INTO pg_eventstream_cursor (position, snapshot, cluster)
        VALUES (coalesce(last.position, 0) + moved, cur, here);
    END IF;
    IF moved > 0 THEN
        -- A client may soon have seen these ids, so no crash and no failover may take them
        -- back, nor the events, whose commits precede this one in the WAL: however the
        -- database is set up, and whatever the senders wait for.
        IF current_setting('synchronous_commit') <> 'remote_apply' THEN
            PERFORM set_config('synchronous_commit', 'on', true);
        END IF;
        -- For those who stream to clients by themselves; nothing to do with the doorbell.
        PERFORM pg_notify('pg_eventstream_news', '');
    END IF;
    RETURN moved;
END
$$;

REVOKE ALL ON FUNCTION pg_eventstream_sequence() FROM PUBLIC;

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
