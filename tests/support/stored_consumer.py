"""The rows of a consumer, as SQL."""

#: A consumer that has not handled anything, and has parked an event.
CONSUMER = """
    INSERT INTO pg_eventstream_consumer (name) VALUES ('stock');
    INSERT INTO pg_eventstream_slot (consumer_id, slot)
    SELECT id, slot FROM pg_eventstream_consumer, generate_series(0, 15) AS slot;
    INSERT INTO pg_eventstream_checkpoint (consumer_id, slot, epoch, position, incarnation)
    SELECT id, slot, 0, 0, 0 FROM pg_eventstream_consumer, generate_series(0, 15) AS slot;
    INSERT INTO pg_eventstream_parked (consumer_id, slot, position, channel, number, type, data,
                                       created, error, traceback, attempts)
    SELECT id, 0, 1, 'old', 1, '', '', now(), '', '', 1 FROM pg_eventstream_consumer;
"""
