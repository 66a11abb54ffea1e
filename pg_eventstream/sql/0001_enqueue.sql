-- pg_eventstream_enqueue(): the trigger function behind the deferred constraint
-- trigger on pg_eventstream_event. It runs at COMMIT, once per event, and is all
-- that a sender's transaction does besides its own INSERT.
--
-- It runs at COMMIT so that outbox.seq is drawn after every lock wait of the
-- transaction: if transaction B waited for A, or saw A, then seq(A) < seq(B).
--
-- SECURITY DEFINER: the sending role needs INSERT on the event table and nothing
-- else. A trigger function cannot be called directly, and nobody but the owner
-- may attach it to another table, because EXECUTE is revoked from PUBLIC below
-- (PostgreSQL checks EXECUTE when a trigger is created, not when it fires).
--
-- Every name in it, that of the operator too, says which schema it is of: so it
-- finds its tables in the schema that it was created in, and nothing that a caller
-- put in the way. SET search_path would do the same, for a few percent of each commit:
-- python -m benchmarks.send
DO $do$
BEGIN
    EXECUTE format($create$
CREATE FUNCTION %1$I.pg_eventstream_enqueue() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO %1$I.pg_eventstream_outbox (xid, event_id, channel)
    VALUES (pg_catalog.pg_current_xact_id(), NEW.id, NEW.channel);

    -- The doorbell. The publisher holds this lock, or waits for it, for as long
    -- as it is awake and polls; then the attempt fails at once and no
    -- NOTIFY is sent. NOTIFY takes a database-wide lock until the commit is
    -- durable (src/backend/commands/async.c, PreCommit_Notify), so that ringing
    -- for every commit would make all commits queue up behind each other.
    -- The payload is empty: equal notifications of a transaction fold into one.
    -- A transaction that notifies cannot be prepared for two-phase commit: one that is
    -- to be says SET LOCAL pg_eventstream.bell = off, and the safety poll finds it.
    IF coalesce(pg_catalog.current_setting('pg_eventstream.bell', true), '')
           OPERATOR(pg_catalog.<>) 'off'
        AND pg_catalog.pg_try_advisory_xact_lock_shared(
                %2$L::pg_catalog.regclass::pg_catalog.oid::pg_catalog.int4, 1)
    THEN
        PERFORM pg_catalog.pg_notify('pg_eventstream', '');
    END IF;
    RETURN NULL;
END
$$
    $create$, current_schema(), format('%I.pg_eventstream_event', current_schema()));
END
$do$;

REVOKE ALL ON FUNCTION pg_eventstream_enqueue() FROM PUBLIC;
