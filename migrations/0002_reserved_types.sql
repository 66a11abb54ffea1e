-- Generated from pg_eventstream/migrations/0002_reserved_types.py. Do not edit.
-- Again with: python -m migrations.generate
-- How to apply it, and which route to take: migrations/README.md

BEGIN;
--
-- Raw SQL operation
--
-- What follows needs this lock for a moment. While somebody waits for it, all senders wait behind
-- him, for as long as the oldest transaction that has sent something stays open. So wait for
-- moments only, again and again.
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
-- Create not valid constraint pg_eventstream_type_not_reserved on model event
--
ALTER TABLE "pg_eventstream_event" ADD CONSTRAINT "pg_eventstream_type_not_reserved" CHECK (NOT ("type" IN ('stream-open', 'stream-reset', 'stream-error', 'keep-alive', 'event-erased'))) NOT VALID;
COMMIT;
