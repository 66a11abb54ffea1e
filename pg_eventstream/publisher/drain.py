"""Publishes the stream to every proxy and ends, or reports what a proxy has not taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import psycopg

from ..grip.proxy import Proxy
from ..postgres.connector import Connector
from .feed import Feed


class Drain:
    """Runs one feed per proxy, each on a thread, until everything is published.

    A feed without progress for ``command_patience`` seconds is given up and does not delay the
    others. It is a context manager, at whose end the feeds are stopped.
    """

    def __init__(self, proxies: Sequence[Proxy], connector: Connector) -> None:
        self._limits = connector.limits
        self._end: int | None = None
        self._works = [
            _Work(proxy, connector, self, is_first=not n) for n, proxy in enumerate(proxies)
        ]

    def __enter__(self) -> Drain:
        for work in self._works:
            work.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for work in self._works:
            work.stopping.set()
        self.wake()
        deadline = time.monotonic() + self._limits.join
        for work in self._works:
            work.join(max(0, deadline - time.monotonic()))

    def wake(self) -> None:
        """Tell the feeds that there are new rows in the stream."""
        for work in self._works:
            work.feed.wake()

    def end(self) -> int | None:
        """The position up to which to publish; None while it is not known."""
        return self._end

    def end_at(self, position: int) -> None:
        for work in self._works:
            work.moved_at = time.monotonic()
        self._end = position
        self.wake()

    def is_over(self) -> bool:
        """Whether each feed has ended or was given up."""
        return not any(work.makes_progress(self._limits.command_patience) for work in self._works)

    @property
    def published(self) -> int:
        """The number of published events, counted for each proxy."""
        return sum(work.feed.published for work in self._works)

    @property
    def failed(self) -> bool:
        return not all(work.is_done for work in self._works)

    def report(self, connection: psycopg.Connection[Any]) -> list[str]:
        """Lines that say what each proxy has taken, and what it has not.

        Raises the exception of a feed, such as `psycopg.Error` if it could not read the database.
        """
        for work in self._works:
            if work.error is not None:
                raise work.error
        to_each = len(self._works) > 1
        return [line for work in self._works for line in work.report(connection, to_each)]


class _Work(threading.Thread):
    """One feed."""

    def __init__(self, proxy: Proxy, connector: Connector, drain: Drain, *, is_first: bool) -> None:
        super().__init__(name=f"feed {proxy.name}", daemon=True)
        self._proxy = proxy
        self._drain = drain
        self.stopping = threading.Event()
        self.feed = Feed(proxy, connector, self.stopping, is_first=is_first)
        self._seen = 0
        self.moved_at = 0.0
        self._drained = False
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._drained = self.feed.drain(self._drain.end)
        except Exception as e:  # noqa: BLE001  (raised by `Drain.report`)
            self.error = e
            self.feed.close()

    def makes_progress(self, patience: float) -> bool:
        now = time.monotonic()
        done = self.feed.published + self.feed.refused
        if done != self._seen:
            self._seen, self.moved_at = done, now
        return self.is_alive() and now < self.moved_at + patience

    @property
    def is_done(self) -> bool:
        return self._drained and not self.feed.refused

    def report(self, connection: psycopg.Connection[Any], by_name: bool) -> list[str]:
        feed, name = self.feed, self._proxy.name
        lines = []
        if feed.published or self.is_done:
            to = f" to {name}" if by_name or not self.is_done else ""
            lines.append(f"{feed.published} events published{to}.")
        if feed.refused:
            lines.append(
                f"{name} refused {feed.refused} events, and the hints that replaced them"
                f" ({feed.refusal}). Clients get these events when they reconnect, or with the next"
                " event of their channel."
            )
        if not self._drained:
            row = connection.execute(
                """
                SELECT count(*) FROM pg_eventstream_stream
                 WHERE position > greatest(%s::bigint,
                       (SELECT position FROM pg_eventstream_proxy WHERE name = %s))
                """,
                [feed.position, name],
            ).fetchone()
            waiting = row[0] if row else 0
            lines.append(f"{name}: {feed.trouble or 'no answer'}; {waiting} events wait for it.")
        return lines
