"""One proxy's share of the work: read the stream in order, publish, acknowledge.

Each proxy has its own feed, on its own thread and connection, so that a slow or dead one
delays nobody else.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg

from ..grip import items
from ..grip.hints import Hints
from ..grip.proxy import Proxy, Refused, Unavailable
from ..permission import CHANGES, is_reliable
from ..postgres.connector import Database, explained
from ..postgres.incarnation import ANOTHER_STREAM, CURSOR, UNKNOWN, Cursor
from ..postgres.threads import give_back
from ..send import NAME_LENGTH

logger = logging.getLogger(__name__)

# What one request takes: the next page is read and encoded while the proxy works on this one.
_PAGE_EVENTS = items.BATCH_ITEMS
_PAGE_BYTES = 4_000_000
# After a crash at most this much is published again; the proxy drops what it has seen in
# the last 60 seconds, and prev-id stops what is older.
_ACKNOWLEDGE_SECONDS = 0.5
# For these the next publisher gives the hints that it may not have given any more.
_RECALLED_EVENTS = 100_000
# No change of permission is as long: two names, each character escaped. Who forges longer ones
# fills no memory with them.
_CHANGE_BYTES = 2 * 12 * NAME_LENGTH + 100
_FIRST_RETRY, _MOST_RETRY = 0.1, 10.0


class Feed:
    """Publishes the stream to one proxy, in order, one request at a time.

    `publish_next` does one round. `run` repeats it until ``stopping`` is set, `drain` until nothing
    is left, if that is earlier.
    """

    def __init__(self, proxy: Proxy, database: Database, stopping: threading.Event) -> None:
        self._proxy = proxy
        self._database = database
        self._stopping = stopping
        self._news = threading.Event()
        self._connection: psycopg.Connection[Any] | None = None
        self._position = 0
        self._cursor = UNKNOWN
        self._acknowledged = 0
        self._acknowledged_at = 0.0
        #: Read and encoded, not published yet.
        self._ready: deque[items.Batch] = deque()
        self._page_was_cut = False
        self._hints = Hints()
        #: Events that the proxy has taken, those included in whose place it took a hint.
        self.published = 0
        #: Events of which it has not even taken a hint, and what it said to the last of them.
        self.refused, self.refusal = 0, ""
        #: Why nothing was taken when that was tried last.
        self.trouble: str | None = None

    @property
    def position(self) -> int:
        """Up to here everything is published."""
        return self._position

    def wake(self) -> None:
        """There is news in the stream. From any thread."""
        self._news.set()

    def run(self) -> None:
        delay = _FIRST_RETRY
        while not self._stopping.is_set():
            try:
                self.publish_next()
                delay = _FIRST_RETRY
            except psycopg.Error as e:
                # The leader's own connection decides whether to go on; this one just retries.
                logger.warning("%s: database: %s; trying again", self._proxy.name, explained(e))
                self.close()
                delay = self._pause(delay)
                continue
            except Exception:
                logger.exception("%s: unexpected error; trying again", self._proxy.name)
                self.close()
                delay = self._pause(delay)
                continue
            if not self._has_more and not self._stopping.is_set():
                self._news.wait(self._idle_seconds())
        self.settle()
        self.finish()

    def drain(self, end: Callable[[], int | None]) -> bool:
        """Publish what is in the stream up to ``end``, which is None until that is known.

        Returns whether everything was published before ``stopping`` was set, and all hints were
        given. Raises `psycopg.Error`.
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
        """Publish the next batch of the stream; returns the number of its events.

        It is repeated until the proxy has taken it; 0 if ``stopping`` is set before. Raises
        `psycopg.Error` if the database cannot be read.
        """
        if not self._ready:
            self._read_page()
        batch = self._ready[0] if self._ready else items.Batch([], [])
        published = 0
        if batch.events and self._publish(batch):
            published = len(batch.events)
            # Not if what was read meanwhile is of another stream.
            if self._ready and self._ready[0] is batch:
                self._ready.popleft()
                self._position = batch.events[-1].position
                self._hints.note(batch, time.monotonic())
        self._hint(self._hints.take_due(time.monotonic()))
        return published

    def settle(self) -> None:
        """Give the hints now that `run` would give in the next seconds."""
        self._hint(self._hints.take_due(math.inf))

    def finish(self) -> None:
        """Store the last acknowledgement, if that is possible, and disconnect."""
        try:
            if self._connection is not None and self._position > self._acknowledged:
                self._acknowledge()
        except psycopg.Error as e:
            logger.info("%s: last acknowledgement not stored: %s", self._proxy.name, e)
        self.close()

    def close(self) -> None:
        self._ready.clear()
        self._proxy.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def _has_more(self) -> bool:
        """Whether there is more to publish, for all that is known without a look."""
        return bool(self._ready) or self._page_was_cut

    def _idle_seconds(self) -> float | None:
        """How long to wait for news: until there is something to do without any."""
        if self._position > self._acknowledged:
            return _ACKNOWLEDGE_SECONDS
        due = self._hints.next_due()
        return None if due is None else max(0.0, due - time.monotonic())

    # Reading

    def _read_ahead(self) -> None:
        """Prepare the next batch, if there is more for certain, so that it is ready in time."""
        if (self._page_was_cut or self._news.is_set()) and len(self._ready) < 2:
            # If the database fails now it fails again behind this batch, when it matters.
            with suppress(psycopg.Error):
                self._read_page()

    def _read_page(self) -> None:
        if self._connection is None:
            self._connect()
        assert self._connection is not None  # noqa: S101
        self._news.clear()  # not later: what comes from here on may be missing from the page
        due = time.monotonic() - self._acknowledged_at >= _ACKNOWLEDGE_SECONDS
        if self._position > self._acknowledged and due:
            self._acknowledge()
        after = self._ready[-1].events[-1].position if self._ready else self._position
        rows = self._connection.execute(
            f"""
            SELECT c.*, page.position, channel, number, type,
                   CASE WHEN octet_length(data) <= %s THEN data END, skip_user_ids, prev, found
              FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true LEFT JOIN (
              SELECT * FROM (
                SELECT page.*, sum(least(octet_length(data), %s)) OVER by_position AS bytes,
                       row_number() OVER by_position AS nth, count(*) OVER () AS found
                  FROM (
                    SELECT s.position, s.channel, s.eid + coalesce(s.incarnation, 0) AS number,
                           s.prev, e.type, e.data, e.skip_user_ids
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
            [items.EVENT_BYTES, items.EVENT_BYTES, after, _PAGE_EVENTS, _PAGE_BYTES],
        ).fetchall()
        if not self._still_known(Cursor.of(*rows[0][:4])):
            return
        rows = [row[4:] for row in rows if row[4] is not None]
        # One page's events are mostly of few channels.
        reliable = {channel: is_reliable(channel) for channel in {row[1] for row in rows}}
        events = (
            items.StreamEvent(position, channel, number, kind, data, skip, reliable[channel], prev)
            for position, channel, number, kind, data, skip, prev, _ in rows
        )
        self._ready.extend(items.batches(events))
        give_back()  # what the channel manager may have asked over
        found = rows[0][-1] if rows else 0
        self._page_was_cut = found == _PAGE_EVENTS or found > len(rows)

    def _still_known(self, cursor: Cursor) -> bool:
        """Whether positions mean what they did; else begin anew, where nothing is left out."""
        known, self._cursor = self._cursor, cursor
        if cursor.follows(known):
            return True
        if known.place:
            logger.warning("%s: %s; publishing from there on", self._proxy.name, ANOTHER_STREAM)
        self._position = self._acknowledged = cursor.valid(self._position, known.incarnation)
        self._ready.clear()
        self._page_was_cut = True  # there may be more than this look was for
        return False

    def _connect(self) -> None:
        connection = self._database.connect(f"feed {self._proxy.name}")
        self._connection = connection  # from here on, `close` closes it
        if not connection.shared:
            # To lose the last acknowledgement in a crash is harmless, to wait for the disk
            # with each is not.
            connection.execute("SET synchronous_commit = off")
            # A nested loop over two primary keys, whatever the statistics of the hour say.
            connection.execute("SET enable_hashjoin = off")
            connection.execute("SET enable_mergejoin = off")
        row = connection.execute(
            f"""
            SELECT c.*, p.position, p.incarnation
              FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true
              LEFT JOIN pg_eventstream_proxy AS p ON p.name = %s
            """,  # noqa: S608
            [self._proxy.name],
        ).fetchone()
        assert row is not None  # noqa: S101
        cursor = Cursor.of(*row[:4])
        self._still_known(cursor)
        self._acknowledged = cursor.valid(row[4] or 0, row[5] or 0)
        # What went out while the connection was lost is published already.
        if self._acknowledged > self._position:
            self._recall_hints(connection, self._acknowledged)
            self._position = self._acknowledged

    def _recall_hints(self, connection: psycopg.Connection[Any], position: int) -> None:
        """Note the hints again that may be owed for what another publisher published last."""
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
                "changes": CHANGES,
                "longest": _CHANGE_BYTES,
                "many": Hints.MANY,
                "large": items.EVENT_BYTES,
            },
        ).fetchall()
        now = time.monotonic()
        for nth, channel, change in rows:
            if channel == CHANGES or is_reliable(channel):
                event = items.StreamEvent(nth, channel, 0, "", change, [])
                self._hints.follow(items.item(event), now)

    def _acknowledge(self) -> None:
        assert self._connection is not None  # noqa: S101
        # The row may be gone: somebody has emptied the tables.
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
        """Repeat the batch, unchanged, until the proxy has taken it; False if stopped."""
        delay, failures = _FIRST_RETRY, 0
        while True:
            try:
                self._proxy.post(batch.body, meanwhile=self._read_ahead)
            except Refused as e:
                return self._publish_apart(batch, e)
            except Unavailable as e:
                self.trouble = str(e)
                failures += 1
                if failures in (1, 10) or failures % 100 == 0:
                    logger.warning(
                        "%s: %s; %d events wait, trying again",
                        self._proxy.name, e, len(batch.events),
                    )  # fmt: skip
                delay = self._pause(delay)
                if self._stopping.is_set():
                    return False
            else:
                if failures:
                    logger.info("%s: takes events again", self._proxy.name)
                self.trouble = None
                self.published += len(batch.events)
                return True

    def _hint(self, hints: list[bytes]) -> None:
        for start in range(0, len(hints), items.BATCH_ITEMS):
            if not self._publish(items.Batch([], hints[start : start + items.BATCH_ITEMS])):
                break

    def _publish_apart(self, batch: items.Batch, refusal: Refused) -> bool:
        """The proxy refuses a batch as a whole: find what it refuses, and go on without.

        The offending event is replaced by a hint, upon which clients fetch it from the
        endpoint.
        """
        if not batch.events:
            logger.error("%s: refused hints (%s)", self._proxy.name, refusal)
            return True
        if len(batch.events) > 1:
            middle = len(batch.events) // 2
            return self._publish(
                items.Batch(batch.events[:middle], batch.items[:middle])
            ) and self._publish(items.Batch(batch.events[middle:], batch.items[middle:]))
        event = batch.events[0]
        hint = items.hint(event.channel, event.reliable)
        if batch.items[0] == hint:
            logger.error(
                "%s: refused even a hint of event %d of channel %r (%s); clients get it when they"
                " reconnect or with the channel's next event",
                self._proxy.name, event.number, event.channel, refusal,
            )  # fmt: skip
            self.refused += 1
            self.refusal = str(refusal)
            return True
        logger.error(
            "%s: refused event %d of channel %r (%s); published a hint instead, so that clients"
            " fetch it from the endpoint",
            self._proxy.name, event.number, event.channel, refusal,
        )  # fmt: skip
        instead = items.Batch([event], [hint])
        self._hints.note(instead, time.monotonic())
        return self._publish(instead)

    def _pause(self, delay: float) -> float:
        """Wait, with jitter so that publishers do not retry in step; returns the next delay."""
        self._stopping.wait(delay * random.uniform(0.5, 1.0))  # noqa: S311
        return min(delay * 2, _MOST_RETRY)
