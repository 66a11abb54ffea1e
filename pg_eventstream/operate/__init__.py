"""Shows whether events reach their readers, and why they do not.

    state        reads the state of the database, the publishers and the proxies
    parts        what a state consists of
    queries      the queries of `state`
    findings     judges a state: what is wrong, and what to do
    consumer_findings  judges the consumers of a state
    finding      what a judgement consists of
    screen       shows a state on one screen
    ages         ages, as people read them
    consumer_screen  shows consumers and their parked events
    doctor/      sends probes the way of all events, and names what is wrong on it
    events/      shows the events themselves, in the terminal and in the admin
    prometheus/  the state as metrics, the port of a publisher, alerts and a dashboard

It only reads, except for probes, and no event depends on it. It may import everything but `views`
and `management`, and it is imported by the commands, the admin and the views.
"""
