"""What a web process does for the streams that it serves.

    replay       what a client has missed
    hub          one per process: reads the stream once for all of its clients
    subscription one client's events: first what it missed, then what comes
    direct       a response that streams from this process, without a proxy
    shutdown     ends the streams when the server wants to end
    sockets      what the sockets say about the server and its clients
    resumable    refuses a stream whose request or link would be too long to resume

Imports neither `grip` nor `publisher`.
"""
