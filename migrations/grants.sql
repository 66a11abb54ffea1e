-- Grants each role what it needs and no more. Run it with psql as the owner of the tables, with
-- the search_path of the migration:
--
--     psql -v sender=billing -v endpoint=web -v publisher=events -v pruner=cron -v observer=watcher \
--          -v consumer=worker -v waiter=web -f migrations/grants.sql DATABASE
--
-- The roles must exist. Leave out the variables that you do not need, repeat the command if you
-- have several roles of a kind, and pass a role twice if it does both.

\set ON_ERROR_STOP on

SELECT nspname AS schema
  FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
 WHERE pg_class.oid = 'pg_eventstream_event'::regclass \gset

BEGIN;

-- A sender: a service that inserts events, a Django project that calls send_event(). It cannot
-- set id or created, and cannot read the events of others. An ORM that reads the new id (RETURNING
-- id), such as SQLAlchemy or Rails, needs one more grant:
--     GRANT SELECT (id) ON pg_eventstream_event TO billing;
\if :{?sender}
GRANT USAGE ON SCHEMA :"schema" TO :"sender";
GRANT INSERT (channel, type, data, skip_user_ids, meta) ON pg_eventstream_event TO :"sender";
\endif

-- The endpoint: a web application that serves streams. It reads the events that clients missed,
-- whether the stream is still the same one, and whether a publisher runs, so that it can log
-- that none does.
\if :{?endpoint}
GRANT USAGE ON SCHEMA :"schema" TO :"endpoint";
GRANT SELECT ON pg_eventstream_event, pg_eventstream_stream, pg_eventstream_channel,
                pg_eventstream_cursor
   TO :"endpoint";
GRANT SELECT ON pg_eventstream_publisher, pg_eventstream_proxy TO :"endpoint";
\endif

-- A sequencer: a web application that streams without a proxy where no publisher runs.
\if :{?sequencer}
GRANT USAGE ON SCHEMA :"schema" TO :"sequencer";
GRANT EXECUTE ON FUNCTION pg_eventstream_sequence() TO :"sequencer";
\endif

-- The publisher: eventstream_publisher, which sequences, publishes and prunes.
\if :{?publisher}
GRANT USAGE ON SCHEMA :"schema" TO :"publisher";
GRANT EXECUTE ON FUNCTION pg_eventstream_sequence() TO :"publisher";
GRANT SELECT, INSERT, UPDATE ON pg_eventstream_publisher TO :"publisher";
GRANT SELECT, INSERT, UPDATE, DELETE ON pg_eventstream_proxy TO :"publisher";
GRANT SELECT, DELETE ON pg_eventstream_event, pg_eventstream_stream, pg_eventstream_outbox
   TO :"publisher";
GRANT SELECT ON pg_eventstream_cursor TO :"publisher";
GRANT SELECT, INSERT, UPDATE ON pg_eventstream_channel TO :"publisher";
GRANT SELECT, INSERT, UPDATE ON pg_eventstream_report TO :"publisher";
GRANT SELECT ON pg_eventstream_consumer, pg_eventstream_checkpoint TO :"publisher";
GRANT SELECT (consumer_id, slot, lost), UPDATE (lost) ON pg_eventstream_slot TO :"publisher";
\endif

-- The pruner: eventstream_prune, if a cron job prunes instead of the publisher. It can read when
-- events were sent, but not their data.
\if :{?pruner}
GRANT USAGE ON SCHEMA :"schema" TO :"pruner";
GRANT SELECT (id, created), DELETE ON pg_eventstream_event TO :"pruner";
GRANT SELECT, DELETE ON pg_eventstream_stream, pg_eventstream_outbox TO :"pruner";
GRANT SELECT ON pg_eventstream_cursor, pg_eventstream_proxy TO :"pruner";
GRANT SELECT, INSERT, UPDATE ON pg_eventstream_channel TO :"pruner";
GRANT SELECT, INSERT, UPDATE ON pg_eventstream_report TO :"pruner";
GRANT SELECT ON pg_eventstream_consumer, pg_eventstream_checkpoint TO :"pruner";
GRANT SELECT (consumer_id, slot, lost), UPDATE (lost) ON pg_eventstream_slot TO :"pruner";
\endif

-- A consumer: eventstream_consumers run. What its handlers write to is up to the project. Where no
-- publisher runs, it needs the grants of a sequencer as well. With these grants, a person can do all
-- that eventstream_consumers does but remove a consumer, which needs one more:
--     GRANT DELETE ON pg_eventstream_consumer TO worker;
\if :{?consumer}
GRANT USAGE ON SCHEMA :"schema" TO :"consumer";
GRANT SELECT ON pg_eventstream_event, pg_eventstream_stream, pg_eventstream_cursor TO :"consumer";
GRANT SELECT (xid, seq) ON pg_eventstream_outbox TO :"consumer";
GRANT SELECT, INSERT, UPDATE ON pg_eventstream_consumer TO :"consumer";
GRANT SELECT, INSERT, UPDATE, DELETE ON pg_eventstream_checkpoint, pg_eventstream_slot,
                                        pg_eventstream_parked
   TO :"consumer";
GRANT SELECT, INSERT, UPDATE ON pg_eventstream_report TO :"consumer";
GRANT EXECUTE ON FUNCTION pg_eventstream_consumer_page, pg_eventstream_lock_checkpoints,
                          pg_eventstream_move_checkpoints
   TO :"consumer";
\endif

-- A waiter: a web application that calls Consumer.wait().
\if :{?waiter}
GRANT USAGE ON SCHEMA :"schema" TO :"waiter";
GRANT SELECT ON pg_eventstream_consumer, pg_eventstream_checkpoint, pg_eventstream_cursor
   TO :"waiter";
GRANT SELECT (consumer_id, slot, lost) ON pg_eventstream_slot TO :"waiter";
GRANT SELECT (position, channel) ON pg_eventstream_stream TO :"waiter";
GRANT SELECT (xid, seq) ON pg_eventstream_outbox TO :"waiter";
\endif

-- An observer: eventstream_status and monitoring. It reads how far everything is, but no channel's
-- data. It also needs to see the sessions of other roles:
--     GRANT pg_monitor TO watcher;
\if :{?observer}
GRANT USAGE ON SCHEMA :"schema" TO :"observer";
GRANT SELECT ON pg_eventstream_cursor, pg_eventstream_outbox, pg_eventstream_proxy,
                pg_eventstream_publisher, pg_eventstream_report, pg_eventstream_stream
   TO :"observer";
GRANT SELECT (id, created) ON pg_eventstream_event TO :"observer";
GRANT SELECT ON pg_eventstream_consumer, pg_eventstream_checkpoint, pg_eventstream_slot
   TO :"observer";
GRANT SELECT (consumer_id) ON pg_eventstream_parked TO :"observer";
SELECT pg_get_serial_sequence('pg_eventstream_event', 'id') AS ids \gset
GRANT SELECT ON SEQUENCE :ids TO :"observer";
\endif

COMMIT;
