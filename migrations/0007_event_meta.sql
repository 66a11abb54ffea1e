-- Generated from pg_eventstream/migrations/0007_event_meta.py. Do not edit.
-- Again with: python -m migrations.generate
-- How to apply it, and which route to take: migrations/README.md

BEGIN;
--
-- Raw SQL operation
--
-- What follows needs this lock for a moment. While a session waits for it, all others wait for that
-- session, until the oldest transaction that has used the table ends. So wait for moments only,
-- again and again.
DO $$
BEGIN
    LOOP
        BEGIN
            SET LOCAL lock_timeout = '50ms';
            LOCK TABLE pg_eventstream_event IN ACCESS EXCLUSIVE MODE;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.2);
        END;
    END LOOP;
    SET LOCAL lock_timeout TO DEFAULT;
END
$$;

--
-- Add field meta to event
--
ALTER TABLE "pg_eventstream_event" ADD COLUMN "meta" jsonb NULL;
--
-- Change Meta options on event
--
-- (no-op)
COMMIT;
