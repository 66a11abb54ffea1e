-- Generated from pg_eventstream/migrations/0008_outbox_committed_at.py. Do not edit.
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
            LOCK TABLE pg_eventstream_outbox IN ACCESS EXCLUSIVE MODE;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.2);
        END;
    END LOOP;
    SET LOCAL lock_timeout TO DEFAULT;
END
$$;

--
-- Add field committed_at to outbox
--
ALTER TABLE "pg_eventstream_outbox" ADD COLUMN "committed_at" timestamp with time zone NULL;
--
-- Alter field committed_at on outbox
--
ALTER TABLE "pg_eventstream_outbox" ALTER COLUMN "committed_at" SET DEFAULT (clock_timestamp());
COMMIT;
