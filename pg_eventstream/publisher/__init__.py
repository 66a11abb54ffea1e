"""The daemon, ``manage.py eventstream_publisher``.

It puts committed events in order, publishes them to each proxy in that order, and prunes events
past the retention. Any number of publishers can run; one of them leads.

    daemon       stands by, leads, sequences, and runs the threads below
    lead         the lock that makes one publisher the leader
    doorbell     decides when to look for new events: after a notification, or regularly
    feed         publishes the stream to one proxy, in order, and acknowledges
    timing       measures and traces how long events take
    vitals       what a publisher knows about itself, for probes
    drain        the feeds of ``--once``, which end when everything is published
    pruner       prunes events past the retention
    unseen       prunes events that the trigger did not see

Imported only by the management commands.
"""
