"""Both sides of the GRIP protocol, which Pushpin and Fanout speak.

The publisher sends items to a proxy's control port. The endpoint tells the proxy to hold a
client's response open, and under which link to ask how the stream continues.

    names        the GRIP channels of our channels and users
    items        events as items, and the batches that go out with one request
    hints        hints that follow what was published, for streams that may have missed it
    proxy        a proxy's control endpoint, and the POST that takes a batch
    links        next links: the signed tokens in them, and the ids with which the proxy asks
    instruct     the instructions with which the endpoint answers the proxy
    next_links   logs what keeps a proxy's next link from reaching our view
    signature    logs why a proxy's signature does not verify

Imports neither `streams` nor `publisher`.
"""
