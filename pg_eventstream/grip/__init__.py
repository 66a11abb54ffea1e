"""Both sides of the GRIP protocol, which Pushpin and Fanout speak.

The publisher sends items to a proxy's control port. The endpoint tells the proxy to hold a
client's response open, and under which link to ask how the stream continues.

    proxy        a proxy as the publisher sees it: items, batches, and the POST that takes them
    hold         the instructions with which the endpoint answers, and the tokens of next links
    next_links   logs what keeps a proxy's next link from reaching our view
    signature    logs why a proxy's signature does not verify

Imports neither `streams` nor `publisher`.
"""
