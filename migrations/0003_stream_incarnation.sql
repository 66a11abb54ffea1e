-- Generated from pg_eventstream/migrations/0003_stream_incarnation.py. Do not edit.
-- Again with: python -m migrations.generate
-- How to apply it, and which route to take: migrations/README.md

BEGIN;
--
-- Add field incarnation to stream
--
ALTER TABLE "pg_eventstream_stream" ADD COLUMN "incarnation" bigint NULL;
--
-- Add field prev to stream
--
ALTER TABLE "pg_eventstream_stream" ADD COLUMN "prev" bigint NULL;
COMMIT;
