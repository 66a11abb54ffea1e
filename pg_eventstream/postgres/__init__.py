"""Private database sessions, in addition to those that Django opens for requests.

The publisher and the hub hold locks and LISTEN, so no other code may share, pool or close their
sessions.

    connector    opens and prepares such a session
    watchdog     gives up a statement whose response was lost
    listener     LISTEN, on a session that also runs statements
    threads      a few threads that read the database for the event loop
    locks        the advisory locks
    sequence     puts committed events in order
    places       finds the place in the stream at a time
    slots        the 16 slots of a consumer
    monitor      queries that only look
    report       what processes say about themselves

Imports only `limits` from the package.
"""
