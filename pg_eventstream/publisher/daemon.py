"""The daemon: leads, sequences, and runs one feed per proxy and the pruner.

Any number of publishers can run. One leads; the others stand by, and one of them takes over within
two seconds when the leader's connection to PostgreSQL ends. The lead is a session lock on the
connection that sequences, so a publisher that has lost it cannot sequence any more.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from types import FrameType
from typing import Any

import psycopg

from ..backoff import Backoff
from ..channelmanager import get_channelmanager
from ..checks import first_use
from ..conf import conf
from ..errors import NotPublished
from ..grip.proxy import Proxy
from ..instruments import sequenced_events
from ..postgres.connector import Connector, explain, fetch_one
from ..postgres.report import PUBLISHER, own_version, write_report
from ..postgres.sequence import (
    ANOTHER_STREAM,
    CURSOR,
    SEQUENCE_AND_LOOK,
    UNKNOWN,
    Cursor,
    last_position,
    sequence_all,
    sequence_and_look,
)
from ..postgres.watchdog import WatchedConnection
from .doorbell import Doorbell
from .drain import Drain
from .feed import Feed
from .lead import ONCE, lead, lead_once, leader_name, try_lead
from .pruner import Pruner
from .vitals import Stage, Vitals

logger = logging.getLogger(__name__)

_ONCE_POLL = 0.02
# SIGTERM must end the process within 5 seconds, even if a proxy or the database does not respond.
_INTERRUPT_SECONDS, _EXIT_SECONDS = 1.0, 4.5
_RELEASE_SECONDS = 1.0

Connection = psycopg.Connection[Any]


class Publisher:
    """Sequences events and publishes them to every proxy.

    `run` works until `stop` is called or the process gets a signal to end. `run_once` publishes
    all committed events and returns, for ``--once`` and for tests.
    """

    def __init__(self, connector: Connector) -> None:
        first_use.report()
        conf.check_numbers()
        get_channelmanager()
        self._connector = connector
        self._limits = connector.limits
        self._proxies = self._connect_proxies()
        self._stopping = threading.Event()
        self._doorbell: Doorbell | None = None
        self._connection: Connection | None = None
        self._busy_at = 0.0
        self._known = UNKNOWN
        self._reported: dict[str, object] = {}
        self._role = ""
        self.vitals = Vitals()
        self._report_is_due = False
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def _connect_proxies(self) -> list[Proxy]:
        return [Proxy(config, self._limits) for config in conf.grip_proxies]

    def stop(self) -> None:
        """Finish the batches in flight, release the lead, and return from `run`."""
        self._stopping.set()
        if self._doorbell is not None:
            self._doorbell.wake()
        interrupt = threading.Timer(_INTERRUPT_SECONDS, self._interrupt)
        interrupt.daemon = True
        interrupt.start()

    def _interrupt(self) -> None:
        """Cancel a statement that takes too long or waits for a lock. It is rolled back."""
        connection = self._connection
        if connection is not None and not connection.closed:
            with suppress(psycopg.Error):
                connection.cancel_safe(timeout=1)

    def run(self) -> None:
        """Lead, or stand by to lead, until stopped. Errors of the database do not end it."""
        logger.info(
            "publisher %s: database %s, proxies: %s",
            self.name,
            self._connector,
            ", ".join(proxy.name for proxy in self._proxies) or "none",
            extra={"event": "publisher-started", "publisher": self.name},
        )
        backoff = Backoff(*self._limits.reconnect)
        with self._signals():
            while not self._stopping.is_set():
                self.vitals.enter(Stage.CONNECTING)
                try:
                    with self._connector.connect("leader") as connection:
                        self._connection = connection
                        if self._stand_by(connection):
                            backoff.reset()
                            self._lead(connection)
                except psycopg.Error as e:
                    if self._stopping.is_set():
                        break
                    logger.warning(
                        "database: %s; connecting again",
                        explain(e),
                        extra={
                            "event": "database-lost",
                            "part": "publisher",
                            "publisher": self.name,
                        },
                    )
                    self._stopping.wait(backoff.next())
        logger.info(
            "publisher %s: stopped",
            self.name,
            extra={"event": "publisher-stopped", "publisher": self.name},
        )

    def run_once(self, say: Callable[[str], object] = lambda line: None) -> int:
        """Sequence and publish all events committed by now, then prune. ``say`` gets the results.

        Returns the number of published events, counted for each proxy. Raises `NotLeading` if
        another publisher leads, `psycopg.Error` if the database fails, and `NotPublished` if a
        proxy has not taken everything or `stop` was called. It does not wait for anything that
        makes no progress.
        """
        patience = self._limits.command_patience
        try:
            with (
                self._signals(exit_code=1),
                self._connector.connect(ONCE, patience=patience) as connection,
            ):
                self._connection = connection
                lead_once(connection, patience)
                return self._publish_once(connection, say)
        except psycopg.Error as e:
            if self._stopping.is_set():
                raise NotPublished("Stopped before everything was published.") from e
            raise

    def _publish_once(self, connection: WatchedConnection, say: Callable[[str], object]) -> int:
        register(connection, self.name, self._proxies)
        count = 0
        with Drain(self._proxies, self._connector) as drain:
            for sequenced in sequence_all(connection):
                count += sequenced
                sequenced_events.inc(sequenced)
                drain.wake()
                connection.execute(_BEAT)
                if self._stopping.is_set():
                    break
            else:
                drain.end_at(last_position(connection))
            beat_at = time.monotonic() + self._limits.heartbeat
            while not drain.is_over() and not self._stopping.wait(_ONCE_POLL):
                if time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + self._limits.heartbeat
                    connection.execute(_BEAT)
        lines = drain.report(connection)
        if not self._proxies:
            lines = [
                f"{count} events sequenced. No GRIP proxy is configured, so they were published to"
                " none (set GRIP_URL or GRIP_PROXIES)."
            ]
        if drain.end() is None or drain.failed:
            if self._stopping.is_set():
                lines.append("Stopped before everything was published.")
            with suppress(psycopg.Error):  # the other error matters more; the next run prunes, too
                Pruner(connection, self._stopping).run_once()
            raise NotPublished("\n".join(lines))
        for line in lines:
            say(line)
        Pruner(connection, self._stopping).run_once()
        return drain.published

    # Leading

    def _stand_by(self, connection: WatchedConnection) -> bool:
        """Wait for the lead. Returns False if stopped before."""
        # It polls instead of waiting for the lock: a statement that waits holds a snapshot, so
        # vacuum could not remove dead rows in any table while this publisher stands by.
        if not lead(connection, self._limits.in_line):
            leader = leader_name(connection)
            logger.info(
                "publisher %s: standing by, %s leads",
                self.name,
                leader,
                extra={"event": "publisher-standing-by", "publisher": self.name, "leader": leader},
            )
            self.vitals.enter(Stage.STANDING_BY, connection)
            while not lead(connection, self._limits.in_line):
                self.vitals.move()
                if self._stopping.wait(self._limits.standby):
                    return False
        return True

    def _lead(self, connection: WatchedConnection) -> None:
        register(connection, self.name, self._proxies)
        self.vitals.enter(Stage.LEADING, connection)
        logger.info(
            "publisher %s: leading",
            self.name,
            extra={"event": "publisher-leading", "publisher": self.name},
        )
        with ExitStack() as stack:
            lock_connection = stack.enter_context(closing(self._connector.connect("bell")))
            # It sleeps only once there are feeds.
            self._doorbell = Doorbell(
                connection,
                lock_connection,
                conf.safety_poll,
                beat=lambda: self._beat(connection, feeds),
                every=self._limits.heartbeat,
            )
            stack.callback(self._close_doorbell, lock_connection)
            self.vitals.listens = self._doorbell.listens
            self._busy_at = time.monotonic()  # the last leader could just have been busy
            self._reported = {}
            feeds = stack.enter_context(self._helpers())
            beat_at = 0.0
            while not self._stopping.is_set():
                self.vitals.move()
                if self._report_is_due:
                    self._report(connection, feeds)
                if time.monotonic() < beat_at:
                    sequenced, before = sequence_and_look(connection, self._known)
                else:
                    beat_at = time.monotonic() + self._limits.heartbeat
                    if connection.shared and not try_lead(connection):
                        return
                    # First, because it says which role may not sequence.
                    self._report(connection, feeds)
                    sequenced, before = self._sequence_and_beat(connection)
                if not before.follows(self._known):
                    if self._known.place:
                        logger.warning(
                            "publisher %s: %s",
                            self.name,
                            ANOTHER_STREAM,
                            extra={
                                "event": "stream-changed",
                                "part": "publisher",
                                "publisher": self.name,
                            },
                        )
                    register(connection, self.name, self._proxies)
                    self._reported = {}
                if sequenced:
                    sequenced_events.inc(sequenced)
                if sequenced or before != self._known:
                    for feed in feeds:
                        feed.wake()
                    self._busy_at = time.monotonic()
                # This call itself could have begun a new incarnation; the next call shows it.
                self._known = before._replace(position=before.position + sequenced)
                self._doorbell.wait(sequenced)

    def _sequence_and_beat(self, connection: Connection) -> tuple[int, Cursor]:
        """`sequence_and_look`, and update the heartbeat.

        It takes one statement, because an idle publisher should send few. The statement also checks
        the queue of all notifications.
        """
        usage, _, sequenced, *cursor = fetch_one(
            connection,
            f"""
            WITH beat AS ({_BEAT})
            SELECT pg_notification_queue_usage(), sequenced.*
              FROM ({SEQUENCE_AND_LOOK}) AS sequenced
            """,  # noqa: S608
            [self._known.as_known],
        )
        self._warn_if_queue_fills(usage)
        return int(sequenced), Cursor.of(*cursor)

    def _beat(self, connection: Connection, feeds: list[Feed]) -> None:
        """Update the heartbeat and the report during a long sleep, without sequencing."""
        self.vitals.move()
        self._report(connection, feeds)
        (usage,) = fetch_one(
            connection, f"WITH beat AS ({_BEAT}) SELECT pg_notification_queue_usage()"
        )
        self._warn_if_queue_fills(usage)

    def _warn_if_queue_fills(self, usage: float) -> None:
        if usage > self._limits.queue_usage:
            logger.warning(
                "PostgreSQL's notification queue is %.0f %% full; when it is full, transactions"
                " that notify fail at COMMIT. A session has used LISTEN and then stayed in a"
                " transaction: find the oldest xact_start in pg_stat_activity, and end it.",
                usage * 100,
                extra={"event": "notification-queue-filling", "usage": usage},
            )

    def _report_soon(self) -> None:
        """Called by a feed on its thread."""
        self._report_is_due = True
        doorbell = self._doorbell
        if doorbell is not None:
            doorbell.wake()

    def _report(self, connection: Connection, feeds: list[Feed]) -> None:
        """Write what this publisher says about itself, if that has changed."""
        assert self._doorbell is not None  # noqa: S101
        self._report_is_due = False
        if not self._reported:
            (self._role,) = fetch_one(connection, "SELECT current_user")
        report = {
            "version": own_version(),
            "python": platform.python_version(),
            "role": self._role,
            "listens": self._doorbell.listens,
            "safety_poll": conf.safety_poll,
            "grip_prefix": conf.grip_prefix,
            "proxies": {feed.name: {"trouble": feed.trouble} for feed in feeds},
        }
        if report != self._reported:
            write_report(connection, PUBLISHER, report)
            self._reported = report

    def _close_doorbell(self, lock_connection: WatchedConnection) -> None:
        assert self._doorbell is not None  # noqa: S101
        doorbell, self._doorbell = self._doorbell, None
        with lock_connection.within(_RELEASE_SECONDS):
            doorbell.close()

    @contextmanager
    def _helpers(self) -> Iterator[list[Feed]]:
        """Run the feeds and the pruner, each on a thread, while this publisher leads."""
        over = threading.Event()
        # New connections: a feed of the last lead can still be waiting for a response.
        proxies = self._connect_proxies()
        feeds = [
            Feed(proxy, self._connector, over, is_first=not n, on_trouble=self._report_soon)
            for n, proxy in enumerate(proxies)
        ]
        threads = [
            threading.Thread(target=feed.run, name=f"feed {proxy.name}", daemon=True)
            for feed, proxy in zip(feeds, proxies, strict=True)
        ]
        pruner = [self._connector, over, lambda: self._busy_at]
        threads.append(threading.Thread(target=Pruner.run, args=pruner, name="pruner", daemon=True))
        for thread in threads:
            thread.start()
        self.vitals.run(feeds, threads)
        try:
            yield feeds
        finally:
            self.vitals.run((), ())
            over.set()
            for feed in feeds:
                feed.wake()
            deadline = time.monotonic() + self._limits.join
            for thread in threads:
                thread.join(max(0, deadline - time.monotonic()))

    @contextmanager
    def _signals(self, exit_code: int = 0) -> Iterator[None]:
        """Stop in order on SIGTERM or SIGINT; end the process at once on a second signal.

        If the database delays the end, the process exits with ``exit_code``.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            if self._stopping.is_set():
                os._exit(128 + number)
            self.stop()
            last_resort.start()
            logger.info(
                "publisher %s: stopping",
                self.name,
                extra={"event": "publisher-stopping", "publisher": self.name},
            )

        last_resort = threading.Timer(_EXIT_SECONDS, self._exit, [exit_code])
        last_resort.daemon = True
        previous = {
            number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            last_resort.cancel()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _exit(self, code: int) -> None:
        """Exit without cleaning up, which is safe as a crash is."""
        logger.warning(
            "publisher %s: stopped, without waiting for the database",
            self.name,
            extra={"event": "publisher-stopped", "publisher": self.name},
        )
        os._exit(code)


def register(connection: Connection, name: str, proxies: list[Proxy]) -> None:
    """Write the leader and the proxies to the tables.

    A new proxy can be a known one with a new address, so it starts at the position of the slowest
    known proxy; publishing an event again is harmless. No stream needs events older than
    ``EVENTSTREAM_NEXT_LINK_TIMEOUT``: it has asked the application since then, or its client
    reconnects with the id that it holds.

    If no proxy is configured, the known ones remain, because the next start can have them again.
    """
    names = [proxy.name for proxy in proxies]
    with connection.transaction():
        connection.execute(
            """
            INSERT INTO pg_eventstream_publisher (id, name, leading_since, heartbeat)
            VALUES (1, %s, now(), now())
            ON CONFLICT (id) DO UPDATE SET name = excluded.name,
                leading_since = excluded.leading_since, heartbeat = excluded.heartbeat
            """,
            [name],
        )
        if not names:
            return
        connection.execute(
            f"""
            INSERT INTO pg_eventstream_proxy (name, position, incarnation)
            SELECT name,
                   greatest(CASE WHEN known.position > c.position THEN 0 ELSE known.position END,
                            old.position, 0),
                   coalesce(c.incarnation, 0)
              FROM unnest(%(names)s::text[]) AS name
              LEFT JOIN {CURSOR} AS c ON true
              LEFT JOIN (
                   SELECT min(position) AS position FROM pg_eventstream_proxy
                   ) AS known ON true
              LEFT JOIN (
                   SELECT position FROM pg_eventstream_stream
                    WHERE sequenced_at < now() - make_interval(secs => %(seconds)s)
                    ORDER BY position DESC LIMIT 1
                   ) AS old ON true
             -- Where all are known, nothing has to be looked for.
             WHERE name NOT IN (SELECT name FROM pg_eventstream_proxy)
            ON CONFLICT (name) DO NOTHING
            """,  # noqa: S608
            {"names": names, "seconds": conf.next_link_timeout},
        )
        connection.execute("DELETE FROM pg_eventstream_proxy WHERE name <> ALL(%s)", [names])


_BEAT = "UPDATE pg_eventstream_publisher SET heartbeat = now() WHERE id = 1"
