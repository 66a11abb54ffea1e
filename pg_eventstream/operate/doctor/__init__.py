"""The doctor: sends probes the way of all events, and names what is wrong on it.

    address      finds the URL at which clients open streams
    client       a client of the endpoint that notes what a browser would hide
    probes       sends probes, and times their way
    measured     what the doctor has measured
    opening      finds out why a stream did not open
    diagnosis    finds out why probes did not arrive, from what was measured

The stream that it opens is that of `pg_eventstream.doctor`.
"""
