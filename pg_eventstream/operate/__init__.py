"""Shows whether events reach their readers, and why they do not.

    state        reads the state of the database, the publishers and the proxies, in a few queries

It only reads, except for probes, and no event depends on it. It may import everything but `views`
and `management`, and it is imported by the commands, the admin and the views.
"""
