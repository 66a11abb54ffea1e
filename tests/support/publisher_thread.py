"""A publisher on a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pg_eventstream.limits import LIMITS, Limits
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher


@contextmanager
def running_publisher(limits: Limits = LIMITS) -> Iterator[Publisher]:
    """Run a publisher until the end of the block."""
    publisher = Publisher(Connector("default", limits=limits))
    thread = threading.Thread(target=publisher.run)
    thread.start()
    try:
        yield publisher
    finally:
        publisher.stop()
        thread.join(20)
        assert not thread.is_alive()
