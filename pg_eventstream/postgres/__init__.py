"""Sessions of our own in PostgreSQL, beside those that Django opens for requests.

The publisher and the hub hold locks and LISTEN, so their sessions may not be shared, pooled or
closed by anyone else.

    connector    opens such a session, and prepares it
    watchdog     gives up a statement whose answer was lost
    listener     LISTEN, on a session that also runs statements
    threads      a few threads that read the database for the event loop
    locks        the advisory locks
    sequence     puts committed events in order, and tells how far the order is

Imports nothing of the package but `limits`.
"""
