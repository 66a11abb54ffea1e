-- pg_eventstream_sequence(): gives every event committed since the last call its
-- position (global order) and eid (dense counter of its channel), in commit
-- order. Returns how many events it sequenced.
--
-- Which events are new is decided by comparing two snapshots, the one stored by
-- the last call and the present one, and not by a high-water mark: a transaction
-- that commits late simply arrives in the next call, and one that stays open
-- holds nothing up. The cost depends on the new rows alone, not on other transactions.
--
-- A backlog is sequenced in slices, one with each call, so that its beginning can be published
-- while the rest is sequenced, and is kept if somebody stops. Until it is done the snapshot
-- that it belongs to is kept as well: what commits later comes after it. A call that leaves
-- something rings the doorbell, so that whoever listens calls again.
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
    -- How many events a slice has at most. The first is small, since somebody waits for it. The
    -- others are larger, since each looks up the newest event of each of its channels.
    first_slice CONSTANT bigint := 50000;
    next_slice  CONSTANT bigint := 250000;
    page        CONSTANT bigint := 1000;

    last     pg_eventstream_cursor;
    cluster_ bigint;
    place_   text;
    same     boolean;
    known    boolean;
    cur      pg_snapshot;
    own      xid8;
    moved    bigint;

    -- All transactions before this one were looked at by the calls before.
    known_to xid8;
    -- What a call looks at: all transactions from `low` to before `high`, and those in `parts`,
    -- of which some events may be sequenced already. Of all of them, seqs up to `bound`.
    low      xid8[];
    high     xid8[];
    parts    xid8[];
    bound    bigint;
    -- How the bound of a slice is found, see below.
    size     bigint;
    lowest   bigint;
    begun    bigint[];
    later    bigint;
    most_open bigint;
    next     xid8;
    found    record;
    rest     xid8[];

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

    -- One at a time. Not a lock of the cursor's table: one that keeps others out keeps vacuum out
    -- as well, or waits for it. Nor of a row: this writes nothing, so that an empty call needs no
    -- transaction id and no WAL.
    PERFORM pg_advisory_xact_lock('pg_eventstream_event'::regclass::oid::int, 3);

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
            OR last.place = '' AND (last.cluster IN (0, cluster_) OR last.position = 0);

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
        AND pg_snapshot_xmax(last.snapshot) <= pg_snapshot_xmax(pg_current_snapshot())
        -- Where no call has been before, rows may come from elsewhere. (Imported events have
        -- positions below 1.)
        AND (last.place <> '' OR last.position > 0
             OR NOT EXISTS (SELECT FROM pg_eventstream_stream WHERE position > 0)
                AND NOT EXISTS (SELECT FROM pg_eventstream_outbox
                                 WHERE xid >= pg_snapshot_xmax(pg_current_snapshot()))),
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
        last.until := NULL;
    END IF;
    IF NOT same THEN
        last.began := last.position;
        -- Another one than before. Not random(), which whoever calls this may have seeded.
        last.incarnation := 1000000000000 * (1 + (coalesce(last.incarnation, 0) / 1000000000000
            + abs(hashtextextended(gen_random_uuid()::text, 0) % 999998)) % 999999);
    END IF;

    known_to := pg_snapshot_xmax(last.snapshot);
    LOOP
        IF last.until IS NULL THEN
            low := ARRAY[known_to];
            high := ARRAY['18446744073709551615'::xid8];
            parts := ARRAY(SELECT pg_snapshot_xip(last.snapshot));
            bound := 9223372036854775807;
        ELSE
            -- A slice has the events with the lowest seqs, up to a bound. The index leads by
            -- transaction id, and to look at every transaction for each slice would be too much.
            -- But ids are given in order, and a transaction draws its seqs while it is open.
            -- Suppose that one which we have not looked at has a seq below the bound. When it
            -- drew that, all those with lower ids whose seqs lie above the bound were open too.
            -- As soon as we know more of these than can be open at a time, there is no such
            -- transaction. (Twice as many, in case that the server ran with higher limits before.
            -- If that were wrong, events would come late, and none would be lost.)
            size := CASE WHEN last.done = 0 THEN first_slice ELSE next_slice END;
            most_open := 1000 + 2 * (current_setting('max_connections')::bigint
                                + current_setting('max_prepared_transactions')::bigint
                                + current_setting('max_worker_processes')::bigint);

            -- Those that were looked at for the slices before, and have events left.
            SELECT coalesce(array_agg(p.xid), '{}'), coalesce(array_agg(first.seq), '{}'),
                   min(first.seq)
              INTO parts, begun, lowest
              FROM pg_snapshot_xip(last.snapshot) AS p (xid),
                   LATERAL (SELECT o.seq FROM pg_eventstream_outbox o
                             WHERE o.xid = p.xid AND o.seq > last.done
                             ORDER BY o.xid, o.seq LIMIT 1) AS first
             WHERE pg_visible_in_snapshot(p.xid, last.until);
            later := (SELECT count(*) FROM unnest(begun) AS seq WHERE seq > lowest + size);
            low := '{}';
            high := '{}';
            next := known_to;
            LOOP
                EXIT WHEN later > most_open;
                WITH read AS MATERIALIZED (
                    SELECT xid, seq FROM pg_eventstream_outbox
                     WHERE xid >= next AND xid < pg_snapshot_xmax(last.until)
                     ORDER BY xid, seq LIMIT page
                ), first AS MATERIALIZED (
                    SELECT xid, min(seq) AS seq FROM read
                     WHERE pg_visible_in_snapshot(xid, last.until) GROUP BY xid
                )
                SELECT (SELECT xid FROM read ORDER BY xid DESC LIMIT 1) AS last,
                       (SELECT count(*) FROM read) = page AS more,
                       least(lowest, (SELECT min(seq) FROM first)) AS lowest,
                       (SELECT count(*) FROM first
                         WHERE seq > size + least(lowest, (SELECT min(seq) FROM first))) AS later
                  INTO found;
                IF found.last IS NOT NULL THEN
                    -- All of these transactions, but the last, which may go on after the page.
                    low := low || next;
                    high := high || found.last;
                    parts := parts || found.last;
                    lowest := found.lowest;
                    later := later + found.later;
                    next := (found.last::text::bigint + 1)::text::xid8;
                END IF;
                IF NOT found.more THEN
                    next := pg_snapshot_xmax(last.until);
                    EXIT;
                END IF;
            END LOOP;
            bound := lowest + size - 1;
        END IF;

        -- One statement, hence one snapshot: the one it reads with is the one that is
        -- stored, and no commit can fall between the two.
        WITH
        fresh AS MATERIALIZED (
            -- OFFSET 0: looked up one by one. As a join it might be planned as a walk over the
            -- whole outbox, with all that is dead there and not vacuumed.
            (SELECT o.seq, o.event_id, o.channel, o.committed_at
              FROM unnest(low, high) AS whole (low, high),
                   LATERAL (SELECT * FROM pg_eventstream_outbox
                             WHERE xid >= whole.low AND xid < whole.high AND seq <= bound OFFSET 0) AS o
             WHERE known
               AND pg_visible_in_snapshot(o.xid, coalesce(last.until, (SELECT pg_current_snapshot())))
               AND o.xid IS DISTINCT FROM own
            UNION ALL
            SELECT o.seq, o.event_id, o.channel, o.committed_at
              FROM unnest(parts) AS part (xid),
                   LATERAL (SELECT * FROM pg_eventstream_outbox
                             WHERE xid = part.xid
                               AND seq > CASE WHEN part.xid < known_to
                                              THEN coalesce(last.done, 0) ELSE 0 END
                               AND seq <= bound OFFSET 0) AS o
             WHERE known
               AND pg_visible_in_snapshot(part.xid, coalesce(last.until, (SELECT pg_current_snapshot())))
               AND part.xid IS DISTINCT FROM own
             -- One more than a slice says that there is more.
             LIMIT CASE WHEN last.until IS NULL THEN first_slice + 1 END)
            UNION ALL
            -- pg_restore --data-only lets the trigger fire for what the outbox gets anyway;
            -- the higher number is then the one that was drawn at the event's own COMMIT
            SELECT max(o.seq), o.event_id, o.channel, max(o.committed_at)
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
            SELECT named.channel,
                   coalesce(newest.eid, pruned.eid) AS eid,
                   coalesce(newest.incarnation, pruned.incarnation) AS incarnation
              FROM (SELECT DISTINCT channel FROM fresh
                     WHERE last.until IS NOT NULL OR NOT known
                        OR (SELECT count(*) FROM fresh) <= first_slice) AS named
             CROSS JOIN LATERAL (
                   SELECT coalesce(max(c.pruned), 0) AS eid,
                          coalesce(max(c.incarnation), 0) AS incarnation
                     FROM pg_eventstream_channel c WHERE c.name = named.channel OFFSET 0
                 ) AS pruned
              LEFT JOIN LATERAL (
                   SELECT s.eid, coalesce(s.incarnation, 0) AS incarnation
                     FROM pg_eventstream_stream s
                    WHERE s.channel = named.channel AND s.eid > pruned.eid
                    ORDER BY s.eid DESC LIMIT 1
                 ) AS newest ON true
        ),
        numbered AS (
            INSERT INTO pg_eventstream_stream
                (position, channel, eid, event_id, incarnation, prev, committed_at)
            SELECT last.position + row_number() OVER (ORDER BY seq),
                   channel,
                   tip.eid + row_number() OVER of_channel,
                   event_id,
                   nullif(last.incarnation, 0),
                   CASE WHEN tip.incarnation <> last.incarnation AND row_number() OVER of_channel = 1
                        THEN tip.eid + tip.incarnation END,
                   committed_at
              FROM fresh JOIN tip USING (channel)
            WINDOW of_channel AS (PARTITION BY channel ORDER BY seq)
        )
        SELECT count(*), pg_current_snapshot() INTO moved, cur FROM fresh;

        EXIT WHEN last.until IS NOT NULL;
        -- A snapshot lists all transactions that are unfinished but the one that takes it.
        IF own < pg_snapshot_xmax(cur) THEN
            cur := format('%s:%s:%s', pg_snapshot_xmin(cur), pg_snapshot_xmax(cur),
                (SELECT string_agg(xid::text, ',' ORDER BY xid)
                   FROM (SELECT own UNION SELECT pg_snapshot_xip(cur)) AS unfinished (xid)));
        END IF;
        EXIT WHEN NOT known OR moved <= first_slice;
        -- A backlog, of which this call sequences the first slice.
        last.until := cur;
        last.done := 0;
    END LOOP;

    IF last.until IS NOT NULL THEN
        -- What has been looked at and is not sequenced yet.
        rest := ARRAY(
            SELECT DISTINCT o.xid
              FROM unnest(low, high) AS whole (low, high),
                   LATERAL (SELECT * FROM pg_eventstream_outbox
                             WHERE xid >= whole.low AND xid < whole.high AND seq > bound OFFSET 0
                           ) AS o
             WHERE pg_visible_in_snapshot(o.xid, last.until)
            UNION
            SELECT part.xid
              FROM unnest(parts) AS part (xid),
                   LATERAL (SELECT FROM pg_eventstream_outbox
                             WHERE xid = part.xid AND seq > bound LIMIT 1) AS o
             WHERE pg_visible_in_snapshot(part.xid, last.until));
        IF next = pg_snapshot_xmax(last.until) AND rest = '{}' THEN
            cur := last.until;
            last.until := NULL;
            bound := NULL;
        ELSE
            -- As if all that has been looked at was finished, but for what has events left and
            -- for what comes after the backlog.
            SELECT format('%s:%s:%s', coalesce((array_agg(xid ORDER BY xid))[1], next), next,
                          string_agg(xid::text, ',' ORDER BY xid))
              INTO cur
              FROM (SELECT unnest(rest) UNION SELECT pg_snapshot_xip(last.until)) AS unfinished (xid)
             WHERE xid < next;
        END IF;
        PERFORM pg_notify('pg_eventstream', '');
    ELSE
        bound := NULL;
    END IF;

    IF moved > 0 OR NOT known OR NOT same OR last.place <> place_ OR last.done IS DISTINCT FROM bound THEN
        DELETE FROM pg_eventstream_cursor WHERE position = last.position;
        INSERT INTO pg_eventstream_cursor
            (position, snapshot, cluster, incarnation, began, place, until, done)
        VALUES (last.position + moved, cur, cluster_, last.incarnation, last.began, place_,
                last.until, bound);
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
