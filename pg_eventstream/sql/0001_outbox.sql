-- outbox.seq is drawn by the database, and only there: it is the commit order.
ALTER TABLE pg_eventstream_outbox ALTER COLUMN seq ADD GENERATED ALWAYS AS IDENTITY;

-- Rows are inserted once and deleted by the sweep, a whole day's worth every day:
-- vacuum by a share of what changes, not by a share of what is kept.
ALTER TABLE pg_eventstream_outbox SET (autovacuum_vacuum_scale_factor = 0.02);
ALTER TABLE pg_eventstream_cursor SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
