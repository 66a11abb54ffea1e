"""The part of a web process that serves streams.

    replay       reads the events that a client missed
    hub          one per process: reads the stream once for all clients
    subscription the events of one client: first the missed ones, then new ones
    direct       a response that streams from this process, without a proxy
    shutdown     ends the streams when the server ends
    sockets      what the process's sockets reveal about the server and its clients
    resumable    refuses a stream whose request or link would be too long to resume

Imports neither `grip` nor `publisher`.
"""
