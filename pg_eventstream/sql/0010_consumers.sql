-- What consumers run all day. As functions, because their plans must not hang on statistics, which
-- are old after a burst, nor on the size that a table had when the plan was made: a table with
-- many versions of 16 rows, or one that was empty, would be read as a whole. The session also keeps
-- their plans where statements are not prepared, as Django does not by default.

-- The events of a consumer in some slots (null: all) after a position, at most `events_` of the
-- next `positions_`, and without data of more than `bytes_`. All in one snapshot: the first row,
-- and only this, has `state`: what is stored about the consumer, the end of the page, and the time
-- in seconds since 1970.
CREATE FUNCTION pg_eventstream_consumer_page(
    consumer_ integer, after_ bigint, positions_ integer, events_ integer, bytes_ integer,
    channels_ text[], prefixes_ text[], slots_ integer[]
) RETURNS TABLE (
    state text, "position" bigint, channel text, number bigint, type text, data text, meta text,
    created double precision, committed_at double precision)
LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET plan_cache_mode = force_generic_plan
SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH page AS MATERIALIZED (
        SELECT * FROM pg_eventstream_stream
         WHERE position > after_ ORDER BY position LIMIT positions_
    )
    SELECT json_build_object(
               'cursor', (SELECT json_build_array(c.position, c.incarnation, c.began, c.place)
                            FROM pg_eventstream_cursor AS c ORDER BY position DESC LIMIT 1),
               'name', k.name, 'epoch', k.epoch, 'paused', k.paused,
               'lost', (SELECT json_agg(json_build_array(slot, lost)) FROM pg_eventstream_slot
                         WHERE consumer_id = consumer_ AND lost IS NOT NULL),
               'last', page.last, 'count', page.count,
               'asked', date_part('epoch', statement_timestamp()))::text,
           NULL::bigint, NULL::text, NULL::bigint, NULL::text, NULL::text, NULL::text,
           NULL::double precision, NULL::double precision
      FROM (SELECT max(page.position), count(*) FROM page) AS page (last, count)
      LEFT JOIN pg_eventstream_consumer AS k ON k.id = consumer_
     UNION ALL
    -- The events are looked up one by one (OFFSET 0).
    (SELECT NULL, s.position, s.channel::text, s.eid + coalesce(s.incarnation, 0), e.type::text,
            CASE WHEN octet_length(e.data) <= bytes_ THEN e.data END, e.meta::text,
            date_part('epoch', e.created), date_part('epoch', s.committed_at)
       FROM page AS s
      CROSS JOIN LATERAL (SELECT * FROM pg_eventstream_event WHERE id = s.event_id OFFSET 0) AS e
      WHERE NOT starts_with(s.channel, 'pg_eventstream:')
        AND (s.channel = ANY(channels_)
             OR channels_ = '{}' AND prefixes_ = '{}'
             OR EXISTS (SELECT FROM unnest(prefixes_) AS prefix WHERE starts_with(s.channel, prefix)))
        AND (slots_ IS NULL
             OR mod(get_byte(sha256(convert_to(s.channel, 'UTF8')), 0), 16) = ANY(slots_))
      ORDER BY s.position LIMIT events_)
     ORDER BY 2 NULLS FIRST;
END
$$;

-- Locks checkpoints. Returns false if one of them was moved.
CREATE FUNCTION pg_eventstream_lock_checkpoints(
    consumer_ integer, slots_ smallint[], epochs_ bigint[], positions_ bigint[]
) RETURNS boolean
LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_bitmapscan = off
SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    FOR n IN 1 .. cardinality(slots_) LOOP
        PERFORM FROM pg_eventstream_checkpoint
          WHERE consumer_id = consumer_ AND slot = slots_[n] AND epoch = epochs_[n]
            AND position = positions_[n]
            FOR UPDATE;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
    END LOOP;
    RETURN true;
END
$$;

-- Moves checkpoints. Returns false if one of them was moved by others.
CREATE FUNCTION pg_eventstream_move_checkpoints(
    consumer_ integer, slots_ smallint[], epochs_ bigint[], positions_ bigint[],
    new_ bigint[], incarnation_ bigint
) RETURNS boolean
LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_bitmapscan = off
SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    FOR n IN 1 .. cardinality(slots_) LOOP
        UPDATE pg_eventstream_checkpoint SET position = new_[n], incarnation = incarnation_
         WHERE consumer_id = consumer_ AND slot = slots_[n] AND epoch = epochs_[n]
           AND position = positions_[n];
        IF NOT FOUND THEN
            RETURN false;
        END IF;
    END LOOP;
    RETURN true;
END
$$;

-- Only roles that run consumers may call them (grants.sql). Like pg_eventstream_sequence(), they
-- find their tables in the schema in which they were created.
DO $$
DECLARE
    function regprocedure;
BEGIN
    FOR function IN
        SELECT oid FROM pg_proc
         WHERE proname IN ('pg_eventstream_consumer_page', 'pg_eventstream_lock_checkpoints',
                           'pg_eventstream_move_checkpoints')
           AND pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = pg_catalog, %I, pg_temp',
                       function, current_schema());
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', function);
    END LOOP;
END
$$;
