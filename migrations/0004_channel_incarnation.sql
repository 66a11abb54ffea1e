-- Generated from pg_eventstream/migrations/0004_channel_incarnation.py. Do not edit.
-- Again with: python -m migrations.generate
-- How to apply it, and which route to take: migrations/README.md

BEGIN;
--
-- Add field incarnation to channel
--
ALTER TABLE "pg_eventstream_channel" ADD COLUMN "incarnation" bigint DEFAULT 0 NOT NULL;
COMMIT;
