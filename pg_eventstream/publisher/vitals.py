"""What a publisher knows about itself, for the probes of whatever runs it."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Sequence

from ..postgres.watchdog import WatchedConnection
from .feed import Feed


class Stage(enum.Enum):
    CONNECTING = "connecting"
    STANDING_BY = "standing by"
    LEADING = "leading"


class Vitals:
    """Written by the publisher's main thread, and read by any thread."""

    def __init__(self) -> None:
        self.stage = Stage.CONNECTING
        #: When the main loop last did something, by `time.monotonic`. It does so every 10 seconds.
        self.moved_at = time.monotonic()
        #: The process id of its session at the server. None if a pooler is in between.
        self.session: int | None = None
        #: Whether notifications arrive at the leader.
        self.listens = True
        self._feeds: Sequence[Feed] = ()
        self._threads: Sequence[threading.Thread] = ()

    def move(self) -> None:
        """Note that the main loop does something."""
        self.moved_at = time.monotonic()

    def enter(self, stage: Stage, connection: WatchedConnection | None = None) -> None:
        self.move()
        is_direct = connection is not None and not connection.shared
        self.session = connection.info.backend_pid if connection and is_direct else None
        self.stage = stage

    def run(self, feeds: Sequence[Feed], threads: Sequence[threading.Thread]) -> None:
        """Take the feeds, and the threads that must run while it leads; none when it ends."""
        self._feeds, self._threads = feeds, threads

    @property
    def ended_threads(self) -> list[str]:
        """The names of threads that must run, and do not."""
        return [thread.name for thread in self._threads if not thread.is_alive()]

    @property
    def troubles(self) -> dict[str, str]:
        """The proxies to which the last attempt to publish has failed, and why."""
        return {feed.name: feed.trouble for feed in self._feeds if feed.trouble is not None}
