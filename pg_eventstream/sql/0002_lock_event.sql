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
