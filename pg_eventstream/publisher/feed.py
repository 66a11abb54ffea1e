"""Publishes to one proxy: reads the stream in order, publishes, acknowledges.

Each proxy has its own feed with its own thread and connection, so that a slow or dead proxy does
not delay the others.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg

from .. import instruments
from ..backoff import Backoff
from ..channels import NAME_LENGTH, PERMISSION_CHANGES, is_reliable, reliable
from ..grip import items
from ..grip.hints import Hints
from ..grip.proxy import Proxy, Refused, Unavailable
from ..postgres.connector import Connector, explain, fetch_one
from ..postgres.sequence import ANOTHER_STREAM, CURSOR, UNKNOWN, Cursor
from ..postgres.threads import return_connections
from ..stream_event import PermissionChange, decode
from .timing import Timing

logger = logging.getLogger(__name__)

# For at most this many events, the next publisher repeats hints that this one might not have given.
_RECALLED_EVENTS = 100_000
# Longer than any permission change: two names with every character escaped. The limit keeps forged
# ones from filling the memory.
_CHANGE_BYTES = 2 * 12 * NAME_LENGTH + 100


class Feed:
    """Publishes the stream to one proxy, in order, one request at a time.

    `publish_next` does one round. `run` repeats it until ``stopping`` is set, and `drain` until
    ``stopping`` is set or everything is published. ``on_trouble`` is called when `trouble` begins
    and when it ends.
    """

    def __init__(
        self,
        proxy: Proxy,
        connector: Connector,
        stopping: threading.Event,
        *,
        is_first: bool = True,
        on_trouble: Callable[[], object] = lambda: None,
    ) -> None:
        self._proxy = proxy
        self._on_trouble = on_trouble
        self._timing = Timing(proxy.name, is_first=is_first)
        self._retries = instruments.publish_retries.labels(proxy.name)
        self._refusals = instruments.refused_events.labels(proxy.name)
        self._connector = connector
        self._stopping = stopping
        self._limits = connector.limits
        self._news = threading.Event()
        self._connection: psycopg.Connection[Any] | None = None
        self._position = 0
        self._cursor = UNKNOWN
        self._acknowledged = 0
        self._acknowledged_at = 0.0
        #: Batches that are read and encoded, but not published yet.
        self._ready: deque[items.Batch] = deque()
        self._page_was_cut = False
        self._hints = Hints(self._limits)
        #: The number of events that the proxy has taken, or has taken a hint for.
        self.published = 0
        #: The number of events for which it has refused even a hint, and the reason for the last
        #: one.
        self.refused, self.refusal = 0, ""
        #: Why the last attempt to publish failed.
        self.trouble: str | None = None

    @property
    def name(self) -> str:
        """The name of its proxy."""
        return self._proxy.name

    @property
    def position(self) -> int:
        """The position up to which everything is published."""
        return self._position

    def wake(self) -> None:
        """Tell the feed that there are new rows in the stream. Can be called from any thread."""
        self._news.set()

    def run(self) -> None:
        """Publish new rows until ``stopping`` is set."""
        backoff = Backoff(*self._limits.retry)
        while not self._stopping.is_set():
            try:
                self.publish_next()
            except Exception as e:
                # The leader's own connection decides whether to end; this one only retries.
                if isinstance(e, psycopg.Error):
                    logger.warning(
                        "%s: database: %s; trying again",
                        self._proxy.name,
                        explain(e),
                        extra={"event": "database-lost", "part": "feed", "proxy": self._proxy.name},
                    )
                else:
                    logger.exception(
                        "%s: unexpected error; trying again",
                        self._proxy.name,
                        extra={
                            "event": "unexpected-error",
                            "part": "feed",
                            "proxy": self._proxy.name,
                        },
                    )
                self.close()
                self._stopping.wait(backoff.next())
                continue
            backoff.reset()
            if not self._has_more and not self._stopping.is_set():
                self._news.wait(self._idle_seconds())
        self.settle()
        self.finish()

    def drain(self, end: Callable[[], int | None]) -> bool:
        """Publish the stream up to ``end``, which returns None until that position is known.

        Returns whether everything was published, including all hints, before ``stopping`` was set.
        Raises `psycopg.Error`.
        """
        last = None
        while not self._stopping.is_set():
            published = self.publish_next()
            if last is not None and (not published or self._position >= last):
                break
            last = end()
            if last is None and not published:
                self._news.wait(self._idle_seconds())
        self.settle()
        drained = not self._stopping.is_set()
        self.finish()
        return drained

    def publish_next(self) -> int:
        """Publish the next batch of the stream. Returns the number of its rows.

        The batch is repeated until the proxy has taken it. Returns 0 if ``stopping`` is set before.
        Raises `psycopg.Error` if the database cannot be read.
        """
        if not self._ready:
            self._read_page()
        batch = self._ready[0] if self._ready else items.Batch([], [])
        published = 0
        if batch.rows and self._publish(batch):
            published = len(batch.rows)
            # Unless rows of another stream were read in the meantime.
            if self._ready and self._ready[0] is batch:
                self._ready.popleft()
                self._position = batch.rows[-1].position
                self._hints.note(batch, time.monotonic())
        self._hint(self._hints.take_due(time.monotonic()))
        return published

    def settle(self) -> None:
        """Publish the hints now that `run` would publish in the next seconds."""
        self._hint(self._hints.take_due(math.inf))

    def finish(self) -> None:
        """Store the last acknowledgement if possible, and disconnect."""
        try:
            if self._connection is not None and self._position > self._acknowledged:
                self._acknowledge()
        except psycopg.Error as e:
            logger.info(
                "%s: last acknowledgement not stored: %s",
                self._proxy.name,
                e,
                extra={"event": "acknowledgement-not-stored", "proxy": self._proxy.name},
            )
        self.close()

    def close(self) -> None:
        self._ready.clear()
        self._timing.forget()
        self._proxy.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def _has_more(self) -> bool:
        """Whether there is more to publish, as far as is known without a query."""
        return bool(self._ready) or self._page_was_cut

    def _idle_seconds(self) -> float | None:
        """How long to wait for new rows, before there is something else to do."""
        if self._position > self._acknowledged:
            return self._limits.acknowledge
        due = self._hints.next_due()
        return None if due is None else max(0.0, due - time.monotonic())

    # Reading

    def _read_ahead(self) -> None:
        """Prepare the next batch in time, if there certainly is one."""
        if (self._page_was_cut or self._news.is_set()) and len(self._ready) < 2:
            # If the database fails now, it fails again after this batch, when it matters.
            with suppress(psycopg.Error):
                self._read_page()

    def _read_page(self) -> None:
        if self._connection is None:
            self._connect()
        assert self._connection is not None  # noqa: S101
        self._news.clear()  # not later: rows added from here on can be missing from the page
        due = time.monotonic() - self._acknowledged_at >= self._limits.acknowledge
        if self._position > self._acknowledged and due:
            self._acknowledge()
        after = self._ready[-1].rows[-1].position if self._ready else self._position
        limits = self._limits
        asked_at = time.monotonic()
        found_rows = self._connection.execute(
            f"""
            SELECT c.*, page.position, channel, number, type,
                   CASE WHEN octet_length(data) <= %s THEN data END, skip_user_ids, prev, found
                   {"".join(f", {name}" for name in self._timing.names)}
              FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true LEFT JOIN (
              SELECT * FROM (
                SELECT page.*, sum(least(octet_length(data), %s)) OVER by_position AS bytes,
                       row_number() OVER by_position AS nth, count(*) OVER () AS found
                  FROM (
                    SELECT s.position, s.channel, s.eid + coalesce(s.incarnation, 0) AS number,
                           s.prev, e.type, e.data, e.skip_user_ids
                           {self._timing.columns}
                      FROM pg_eventstream_stream AS s
                      JOIN pg_eventstream_event AS e ON e.id = s.event_id
                     WHERE s.position > %s
                     ORDER BY s.position LIMIT %s
                  ) AS page
                WINDOW by_position AS (ORDER BY position)
              ) AS measured
             WHERE nth = 1 OR bytes <= %s) AS page ON true
             ORDER BY page.position
            """,  # noqa: S608
            [limits.event_bytes, limits.event_bytes, after, limits.batch_items, limits.page_bytes],
        ).fetchall()
        if not self._still_known(Cursor.of(*found_rows[0][:4])):
            return
        rows = [row[4:11] for row in found_rows if row[4] is not None]
        if rows:
            self._timing.note(found_rows, 12, asked_at)
        # The events of a page are mostly of few channels.
        with_ids = {*reliable({row[1] for row in rows})}
        decoded = (
            decode(position, channel, number, prev, kind, data, skip, channel in with_ids)
            for position, channel, number, kind, data, skip, prev in rows
        )
        self._ready.extend(items.batches(decoded, limits))
        return_connections()  # a connection that the channel manager may have used
        # One request takes a page; the next page is read and encoded while the proxy works.
        found = found_rows[0][11] if rows else 0
        self._page_was_cut = found == limits.batch_items or found > len(rows)

    def _still_known(self, cursor: Cursor) -> bool:
        """Whether positions are still valid. Otherwise go back so that no row is left out."""
        known, self._cursor = self._cursor, cursor
        if cursor.follows(known):
            return True
        if known.place:
            logger.warning(
                "%s: %s; publishing the new stream",
                self._proxy.name,
                ANOTHER_STREAM,
                extra={"event": "stream-changed", "part": "feed", "proxy": self._proxy.name},
            )
        self._position = self._acknowledged = cursor.valid(self._position, known.incarnation)
        self._ready.clear()
        self._timing.forget()
        self._page_was_cut = True  # there can be more rows than this query looked for
        return False

    def _connect(self) -> None:
        connection = self._connector.connect(f"feed {self._proxy.name}")
        self._connection = connection  # from here on, `close` closes it
        if not connection.shared:
            # Losing the last acknowledgement in a crash is harmless, but waiting for the disk with
            # each one is not.
            connection.execute("SET synchronous_commit = off")
            # For a nested loop over two primary keys, with any statistics.
            connection.execute("SET enable_hashjoin = off")
            connection.execute("SET enable_mergejoin = off")
        row = fetch_one(
            connection,
            f"""
            SELECT c.*, p.position, p.incarnation
              FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true
              LEFT JOIN pg_eventstream_proxy AS p ON p.name = %s
            """,  # noqa: S608
            [self._proxy.name],
        )
        cursor = Cursor.of(*row[:4])
        self._still_known(cursor)
        self._acknowledged = cursor.valid(row[4] or 0, row[5] or 0)
        # Rows that were published while the connection was lost are not published again.
        if self._acknowledged > self._position:
            self._recall_hints(connection, self._acknowledged)
            self._position = self._acknowledged

    def _recall_hints(self, connection: psycopg.Connection[Any], position: int) -> None:
        """Schedule hints again that another publisher might not have published."""
        rows = connection.execute(
            """
            WITH last AS (
                SELECT sequenced_at FROM pg_eventstream_stream
                 WHERE position <= %(position)s ORDER BY position DESC LIMIT 1
            ), late AS (
                SELECT s.position, s.channel, octet_length(e.data) AS bytes,
                       CASE WHEN s.channel = %(changes)s AND octet_length(e.data) < %(longest)s
                            THEN e.data END AS change
                  FROM pg_eventstream_stream AS s
                  JOIN pg_eventstream_event AS e ON e.id = s.event_id
                 WHERE s.position BETWEEN %(position)s - %(most)s AND %(position)s
                   AND s.sequenced_at >= (SELECT sequenced_at FROM last) - interval '10 s'
            )
            SELECT position, channel, change FROM late WHERE change IS NOT NULL
            UNION ALL
            SELECT max(position), channel, NULL FROM late
             WHERE channel <> %(changes)s GROUP BY channel
            HAVING count(*) >= %(many)s OR max(bytes) > %(large)s
             ORDER BY position
            """,
            {
                "position": position,
                "most": _RECALLED_EVENTS,
                "changes": PERMISSION_CHANGES,
                "longest": _CHANGE_BYTES,
                "many": self._limits.burst,
                "large": self._limits.event_bytes,
            },
        ).fetchall()
        now = time.monotonic()
        for at, channel, change in rows:
            if channel == PERMISSION_CHANGES:
                self._hints.follow(items.item(decode(at, channel, 0, None, "", change, [])), now)
            elif is_reliable(channel):
                self._hints.follow(items.hint(channel), now)

    def _acknowledge(self) -> None:
        assert self._connection is not None  # noqa: S101
        # The row can be missing, if the tables were emptied.
        self._connection.execute(
            """
            INSERT INTO pg_eventstream_proxy AS proxy (name, position, incarnation)
            VALUES (%s, %s, %s)
            ON CONFLICT (name) DO UPDATE
               SET position = excluded.position, incarnation = excluded.incarnation
             WHERE proxy.position < excluded.position
                OR proxy.incarnation <> excluded.incarnation
            """,
            [self._proxy.name, self._position, self._cursor.incarnation],
        )
        self._acknowledged = self._position
        self._acknowledged_at = time.monotonic()

    # Publishing

    def _publish(self, batch: items.Batch) -> bool:
        """Repeat the unchanged batch until the proxy has taken it. Returns False if stopped."""
        backoff, failures = Backoff(*self._limits.retry), 0
        while True:
            try:
                self._proxy.post(batch.body, meanwhile=self._read_ahead)
            except Refused as e:
                return self._publish_apart(batch, e)
            except Unavailable as e:
                self._notice(str(e))
                failures += 1
                self._retries.inc()
                if failures in (1, 10) or failures % 100 == 0:
                    logger.warning(
                        "%s: %s; %d events wait, trying again",
                        self._proxy.name, e, len(batch.rows),
                        extra={
                            "event": "proxy-unavailable",
                            "proxy": self._proxy.name,
                            "count": len(batch.rows),
                        },
                    )  # fmt: skip
                if self._stopping.wait(backoff.next()):
                    return False
            else:
                if failures:
                    logger.info(
                        "%s: takes events again",
                        self._proxy.name,
                        extra={"event": "proxy-available", "proxy": self._proxy.name},
                    )
                self._notice(None)
                self.published += len(batch.rows)
                if batch.rows:
                    self._timing.published(batch.rows)
                return True

    def _notice(self, trouble: str | None) -> None:
        before, self.trouble = self.trouble, trouble
        if (before is None) != (trouble is None):
            self._on_trouble()

    def _hint(self, hints: list[bytes]) -> None:
        size = self._limits.batch_items
        for start in range(0, len(hints), size):
            if not self._publish(items.Batch([], hints[start : start + size])):
                break

    def _publish_apart(self, batch: items.Batch, refusal: Refused) -> bool:
        """Find the items that the proxy refuses in a batch, and publish the others.

        A hint replaces a refused event, so that clients fetch it from the endpoint.
        """
        if not batch.rows:
            logger.error(
                "%s: refused hints (%s)",
                self._proxy.name,
                refusal,
                extra={"event": "proxy-refused", "proxy": self._proxy.name},
            )
            return True
        if len(batch.rows) > 1:
            middle = len(batch.rows) // 2
            return self._publish(
                items.Batch(batch.rows[:middle], batch.items[:middle])
            ) and self._publish(items.Batch(batch.rows[middle:], batch.items[middle:]))
        row = batch.rows[0]
        if isinstance(row, PermissionChange):
            what = f"permission change {row.position}"
            return self._give_up(
                what, refusal, "it takes effect when the proxy next asks the endpoint"
            )
        what = f"event {row.number} of channel {row.channel!r}"
        hint = items.hint(row.channel, row.reliable)
        if batch.items[0] == hint:
            what = f"even a hint of {what}"
            return self._give_up(
                what, refusal,
                "clients get it when they reconnect or with the channel's next event",
            )  # fmt: skip
        logger.error(
            "%s: refused %s (%s); published a hint instead, so that clients fetch it from the"
            " endpoint",
            self._proxy.name, what, refusal,
            extra={"event": "proxy-refused", "proxy": self._proxy.name},
        )  # fmt: skip
        instead = items.Batch([row], [hint])
        self._hints.note(instead, time.monotonic())
        return self._publish(instead)

    def _give_up(self, what: str, refusal: Refused, instead: str) -> bool:
        """Leave out an item that the proxy refuses in any form."""
        logger.error(
            "%s: refused %s (%s); %s",
            self._proxy.name,
            what,
            refusal,
            instead,
            extra={"event": "proxy-refused", "proxy": self._proxy.name},
        )
        self.refused += 1
        self._refusals.inc()
        self.refusal = str(refusal)
        return True
