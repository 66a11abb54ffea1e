"""Shows whether events reach their readers, and why they do not.

    tail         follows the stream, with the delay of each event
    lines        events of the tail as lines of text or JSON
    browse       pages of events and channels, for the admin
    places       finds the place in the stream at a time
    latest       the latest result of a slow function, shared by concurrent callers
    metrics      the state as gauges for Prometheus
    health       judges whether a publisher is alive and ready
    server       the HTTP port of a publisher: metrics and probes
    state        reads the state of the database, the publishers and the proxies
    queries      the queries of `state`
    findings     judges a state: what is wrong, and what to do
    screen       shows a state on one screen
    address      finds the URL at which clients open streams
    client       a client of the endpoint that notes what a browser would hide
    probes       sends probes, and times their way
    measured     what the doctor has measured
    opening      finds out why a stream did not open
    diagnosis    finds out why probes did not arrive, from what was measured

It only reads, except for probes, and no event depends on it. It may import everything but `views`
and `management`, and it is imported by the commands, the admin and the views.
"""
