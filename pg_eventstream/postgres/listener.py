"""LISTEN on a connection that runs statements as well."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from typing import Any

import psycopg

logger = logging.getLogger(__name__)

#: The channel that the trigger notifies after a commit, if no publisher is awake.
BELL = "pg_eventstream"
#: The channel that sequence() notifies when there are new rows in the stream.
NEWS = "pg_eventstream_news"
#: The channel that is notified when a consumer was paused, reset, or otherwise changed.
CONSUMERS = "pg_eventstream_consumers"

#: The seconds between two polls if LISTEN does not work.
DEAF_POLL = 0.1


class Listener:
    """Waits for notifications on channels. ``deaf`` is true if none arrive on this connection.

    Raises `psycopg.OperationalError` if the connection is lost.
    """

    def __init__(self, connection: psycopg.Connection[Any], *channels: str) -> None:
        self._connection = connection
        self._rung: set[str] = set()
        # Reentrant, because a signal handler can take it while its own thread holds it.
        self._closing = threading.RLock()
        self._closed = False
        connection.add_notify_handler(self._on_notify)
        #: Whether `wake` has ended the last wait.
        self.woken = False
        #: A pooler shares this session with other clients: see `WatchedConnection.shared`.
        self.shared = getattr(connection, "shared", False)
        if not self.shared:
            for channel in channels:
                connection.execute(f"LISTEN {channel}")
        self.deaf = self.shared or not self._hears_itself(channels[0])
        if self.deaf:
            logger.warning(
                "LISTEN does not work on this connection, so it polls every %d ms. Most likely"
                " there is a pooler in transaction mode (PgBouncer), which also breaks session"
                " locks, so that two publishers can lead at once. Use a direct connection (for the"
                " publisher, by --database or --dsn).",
                DEAF_POLL * 1000,
                extra={"event": "listen-broken"},
            )
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)

    def close(self) -> None:
        with self._closing:
            self._closed = True
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def wake(self) -> None:
        """End a wait from another thread or a signal handler."""
        # Once the pipe is closed, another file or connection can have its number.
        with self._closing, contextlib.suppress(BlockingIOError):  # it is full already
            if not self._closed:
                os.write(self._wake_writer, b"w")

    def wait(self, timeout: float | None) -> set[str]:
        """Wait for notifications. Returns their channels, at once if some arrived earlier.

        Returns an empty set after ``timeout`` seconds (None means no limit), or when woken.
        """
        self.woken = False
        if not self._rung:
            if self.deaf:
                timeout = DEAF_POLL if timeout is None else min(timeout, DEAF_POLL)
            _wait_readable(timeout, self._connection.fileno(), self._wake_reader)
            with contextlib.suppress(BlockingIOError):
                self.woken = bool(os.read(self._wake_reader, 1024))
            self._drain()
        rung, self._rung = self._rung, set()
        return rung

    def _drain(self) -> None:
        self._connection.pgconn.consume_input()
        while notify := self._connection.pgconn.notifies():
            self._rung.add(notify.relname.decode())

    def _on_notify(self, notify: psycopg.Notify) -> None:
        self._rung.add(notify.channel)  # it arrived while a statement ran

    def _hears_itself(self, channel: str) -> bool:
        """A pooler in transaction mode (PgBouncer) accepts LISTEN and delivers nothing."""
        self._connection.execute("SELECT pg_notify(%s, '')", [channel])
        deadline = time.monotonic() + 2
        while not self._rung and (left := deadline - time.monotonic()) > 0:
            _wait_readable(left, self._connection.fileno())
            self._drain()
        heard = bool(self._rung)
        self._rung.clear()
        return heard


def _wait_readable(timeout: float | None, *files: int) -> None:
    # Not select(), which accepts no number above 1023. A server of many streams has higher ones.
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    poll.poll(None if timeout is None else max(0, timeout) * 1000)
