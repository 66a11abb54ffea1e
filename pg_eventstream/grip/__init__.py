"""Both sides of GRIP, the protocol of Pushpin and Fanout.

The publisher sends items to a proxy's control port. The endpoint tells the proxy to hold a client's
response open, and at which link to ask how to continue the stream.

    names        the GRIP channels of channels and users
    items        events as items, and the batches that one request publishes
    hints        hints that follow published events, for streams that might have missed them
    proxy        a proxy's control endpoint, and the POST of a batch
    links        next links: their signed tokens, and the ids that the proxy sends
    instruct     the instructions in the endpoint's responses to the proxy
    next_links   logs what prevents a proxy's request from reaching the next link's view
    signature    logs why a proxy's signature cannot be verified

Imports neither `streams` nor `publisher`.
"""
