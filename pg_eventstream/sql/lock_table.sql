-- What follows needs this lock for a moment. While a session waits for it, all others wait for that
-- session, until the oldest transaction that has used the table ends. So wait for moments only,
-- again and again.
DO $$
BEGIN
    LOOP
        BEGIN
            SET LOCAL lock_timeout = '50ms';
            LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.2);
        END;
    END LOOP;
    SET LOCAL lock_timeout TO DEFAULT;
END
$$;
