"""The daemon, ``manage.py eventstream_publisher``.

It puts committed events in order, publishes them to each proxy in that order, and prunes what is
past the retention. Any number may run; one leads.

    daemon       stands by, leads, sequences, and keeps the threads below running
    lead         the lock that makes one of them the leader
    doorbell     when to look for new events: after a notification, or how often
    feed         one proxy's share: reads the stream in order, publishes, acknowledges
    drain        the feeds of ``--once``, which end when everything is published
    pruner       prunes what is past the retention
    unseen       prunes events that the trigger did not see

Imported by the management commands alone.
"""
