"""The daemon: leads, sequences, and keeps one feed per proxy and the sweep going.

Any number of publishers may run; one leads, the others stand by and take over within two
seconds when its connection to PostgreSQL ends. The lead is a session lock on the very
connection that sequences, so whoever lost it cannot sequence any more.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from types import FrameType
from typing import Any

import psycopg

from ..channelmanager import get_channelmanager
from ..checks import first_use
from ..conf import conf
from ..errors import NotPublished
from ..grip.proxy import Proxy
from ..postgres.connector import COMMAND_PATIENCE, Database, explained
from ..postgres.incarnation import ANOTHER_STREAM, CURSOR, SEQUENCE, UNKNOWN, Cursor
from ..postgres.watchdog import WatchedConnection
from .doorbell import Doorbell
from .drain import Drain
from .feed import Feed
from .lead import ONCE, lead, lead_once, leader_name, try_lead
from .pruner import Sweep

logger = logging.getLogger(__name__)

_STANDBY_POLL = 0.5
# For processes of the application that sequence; then the lead is tried for once more.
_IN_LINE_SECONDS = 5.0
_ONCE_POLL = 0.02
_QUEUE_USAGE_WARNING = 0.1
_HEARTBEAT_SECONDS = 10.0
# What has become due is swept soon; when nothing happens, there is little to sweep.
_SWEEP_SECONDS, _QUIET_SWEEP_SECONDS = 30.0, 600.0
_QUIET_SECONDS = 90.0  # behind the last event; an unreliable one is due after a minute
_FIRST_RETRY, _MOST_RETRY = 0.2, 5.0
# SIGTERM must end the process within 5 seconds, whatever a proxy or the database does meanwhile.
_INTERRUPT_SECONDS, _STOP_SECONDS, _EXIT_SECONDS = 1.0, 3.0, 4.5
_RELEASE_SECONDS = 1.0

Connection = psycopg.Connection[Any]


class Publisher:
    """Sequences events and publishes them to every proxy.

    `run` works until `stop` is called or the process is told to end; `run_once` publishes what
    is there and returns, for ``--once`` and for tests.
    """

    def __init__(self, database: Database) -> None:
        first_use.report()
        conf.check_numbers()
        get_channelmanager()
        self._database = database
        self._proxies = [Proxy(config) for config in conf.grip_proxies]
        self._stopping = threading.Event()
        self._doorbell: Doorbell | None = None
        self._connection: Connection | None = None
        self._busy_at = 0.0
        self._known = UNKNOWN
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def stop(self) -> None:
        """Finish the batches in flight, release the lead, and return from `run`."""
        self._stopping.set()
        if self._doorbell is not None:
            self._doorbell.wake()
        interrupt = threading.Timer(_INTERRUPT_SECONDS, self._interrupt)
        interrupt.daemon = True
        interrupt.start()

    def _interrupt(self) -> None:
        """End a statement that takes too long, or waits for a lock; it is rolled back."""
        connection = self._connection
        if connection is not None and not connection.closed:
            with suppress(psycopg.Error):
                connection.cancel_safe(timeout=1)

    def run(self) -> None:
        """Lead, or stand by to lead, until stopped. Never ends because of the database."""
        logger.info(
            "publisher %s: database %s, proxies: %s",
            self.name,
            self._database,
            ", ".join(proxy.name for proxy in self._proxies) or "none",
        )
        delay = _FIRST_RETRY
        with self._signals():
            while not self._stopping.is_set():
                try:
                    with self._database.connect("leader") as connection:
                        self._connection = connection
                        if self._stand_by(connection):
                            delay = _FIRST_RETRY
                            self._lead(connection)
                except psycopg.Error as e:
                    if self._stopping.is_set():
                        break
                    logger.warning("database: %s; connecting again", explained(e))
                    self._stopping.wait(delay * random.uniform(0.5, 1.0))  # noqa: S311
                    delay = min(delay * 2, _MOST_RETRY)
        logger.info("publisher %s: stopped", self.name)

    def run_once(self, say: Callable[[str], object] = lambda line: None) -> int:
        """Sequence and publish what is committed by now, then sweep. Says what was done.

        Returns the events published, counted for each proxy. Raises `NotLeading` if another
        publisher leads, `psycopg.Error` if the database fails, and `NotPublished` if a proxy
        has not taken everything, or `stop` was called. Waits for nothing that does not move.
        """
        try:
            with (
                self._signals(exit_code=1),
                self._database.connect(ONCE, patience=COMMAND_PATIENCE) as connection,
            ):
                self._connection = connection
                lead_once(connection, COMMAND_PATIENCE)
                return self._publish_once(connection, say)
        except psycopg.Error as e:
            if self._stopping.is_set():
                raise NotPublished("Stopped before everything was published.") from e
            raise

    def _publish_once(self, connection: WatchedConnection, say: Callable[[str], object]) -> int:
        _register(connection, self.name, self._proxies)
        count = 0
        with Drain(self._proxies, self._database, COMMAND_PATIENCE) as drain:
            for sequenced in sequence_what_is_there(connection):
                count += sequenced
                drain.wake()
                connection.execute(_BEAT)
                if self._stopping.is_set():
                    break
            else:
                drain.end_at(last_position(connection))
            beat_at = time.monotonic() + _HEARTBEAT_SECONDS
            while not drain.is_over() and not self._stopping.wait(_ONCE_POLL):
                if time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + _HEARTBEAT_SECONDS
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
            with suppress(psycopg.Error):  # this is worse, and the next time prunes as well
                Sweep(connection, self._stopping).run_once()
            raise NotPublished("\n".join(lines))
        for line in lines:
            say(line)
        Sweep(connection, self._stopping).run_once()
        return drain.published

    # Leading

    def _stand_by(self, connection: WatchedConnection) -> bool:
        """Wait for the lead; False if stopped first."""
        # Tries, rather than waits for the lock: a statement that waits holds a snapshot,
        # and vacuum could clean nothing anywhere for as long as we stand by.
        if not lead(connection, _IN_LINE_SECONDS):
            logger.info("publisher %s: standing by, %s leads", self.name, leader_name(connection))
            while not lead(connection, _IN_LINE_SECONDS):
                if self._stopping.wait(_STANDBY_POLL):
                    return False
        return True

    def _lead(self, connection: WatchedConnection) -> None:
        _register(connection, self.name, self._proxies)
        logger.info("publisher %s: leading", self.name)
        with ExitStack() as stack:
            locker = stack.enter_context(closing(self._database.connect("bell")))
            self._doorbell = Doorbell(connection, locker, conf.safety_poll)
            stack.callback(self._close_doorbell, locker)
            self._busy_at = time.monotonic()  # the last leader may have been, a moment ago
            feeds = stack.enter_context(self._helpers())
            beat_at = 0.0
            while not self._stopping.is_set():
                if time.monotonic() < beat_at:
                    sequenced, before = _sequence(connection, self._known)
                else:
                    beat_at = time.monotonic() + _HEARTBEAT_SECONDS
                    if connection.shared and not try_lead(connection):
                        return
                    sequenced, before = _sequence_and_beat(connection, self._known)
                if not before.follows(self._known):
                    if self._known.place:
                        logger.warning("publisher %s: %s", self.name, ANOTHER_STREAM)
                    _register(connection, self.name, self._proxies)
                if sequenced or before != self._known:
                    for feed in feeds:
                        feed.wake()
                    self._busy_at = time.monotonic()
                # The call itself may have begun a new incarnation; the next one tells.
                self._known = before._replace(position=before.position + sequenced)
                self._doorbell.wait(sequenced)

    def _close_doorbell(self, locker: WatchedConnection) -> None:
        assert self._doorbell is not None  # noqa: S101
        doorbell, self._doorbell = self._doorbell, None
        with locker.within(_RELEASE_SECONDS):
            doorbell.close()

    @contextmanager
    def _helpers(self) -> Iterator[list[Feed]]:
        """The feeds and the sweep, each on a thread, for as long as we lead."""
        over = threading.Event()
        # Connections of their own: a feed of our last lead may still wait for an answer.
        proxies = [Proxy(config) for config in conf.grip_proxies]
        feeds = [Feed(proxy, self._database, over) for proxy in proxies]
        threads = [
            threading.Thread(target=feed.run, name=f"feed {proxy.name}", daemon=True)
            for feed, proxy in zip(feeds, proxies, strict=True)
        ]
        threads.append(threading.Thread(target=self._sweep_regularly, args=[over], daemon=True))
        for thread in threads:
            thread.start()
        try:
            yield feeds
        finally:
            over.set()
            for feed in feeds:
                feed.wake()
            deadline = time.monotonic() + _STOP_SECONDS
            for thread in threads:
                thread.join(max(0, deadline - time.monotonic()))

    def _sweep_regularly(self, over: threading.Event) -> None:
        while not over.is_set():
            try:
                with self._database.connect("sweep") as connection:
                    sweep = Sweep(connection, over)
                    while not over.is_set():
                        if sweep.run_once():
                            self._busy_at = time.monotonic()
                        self._wait_for_sweep(over)
            except psycopg.Error as e:
                logger.warning("sweep: database: %s; trying again", explained(e))
            except Exception:
                logger.exception("sweep: unexpected error; trying again")
            over.wait(_SWEEP_SECONDS)

    def _wait_for_sweep(self, over: threading.Event) -> None:
        swept_at = time.monotonic()
        while not over.wait(_SWEEP_SECONDS):
            now = time.monotonic()
            # Events that others sequence count as quiet; those are swept a little later.
            quiet_sweep = _QUIET_SWEEP_SECONDS
            if (retention := conf.retention) is not None:
                quiet_sweep = min(quiet_sweep, retention.total_seconds() / 10)
            if now < self._busy_at + _QUIET_SECONDS or now >= swept_at + quiet_sweep:
                return

    @contextmanager
    def _signals(self, exit_code: int = 0) -> Iterator[None]:
        """SIGTERM and SIGINT stop in good order; a second one ends the process at once.

        With ``exit_code`` if the database holds that up.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            if self._stopping.is_set():
                os._exit(128 + number)
            self.stop()
            last_resort.start()
            logger.info("publisher %s: stopping", self.name)

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
        """What is left undone is no more than after a crash."""
        logger.warning("publisher %s: stopped, without waiting for the database", self.name)
        os._exit(code)


def sequence(connection: Connection) -> int:
    """Give the events committed since the last call their order; returns how many.

    A backlog takes several calls: until one returns 0. Durable when this returns: what a client may
    have seen keeps its id across a crash.
    """
    return _sequence(connection, UNKNOWN)[0]


# With it, the cursor as it was before: whoever else may sequence rings for no feed.
_SEQUENCE = f"""
    SELECT {SEQUENCE}, c.*
      FROM (SELECT) AS always LEFT JOIN {CURSOR} AS c ON true
"""  # noqa: S608


def _sequence(connection: Connection, known: Cursor) -> tuple[int, Cursor]:
    """How many events were sequenced, and the cursor before."""
    row = connection.execute(_SEQUENCE, [known.as_known]).fetchone()
    assert row is not None  # noqa: S101
    return int(row[1]), Cursor.of(*row[2:])


def sequence_what_is_there(connection: Connection) -> Iterator[int]:
    """Sequence what is committed by now, and some of what is while it works.

    Yields how many events each call has sequenced.
    """
    row = connection.execute("SELECT pg_current_snapshot()::text").fetchone()
    assert row is not None  # noqa: S101
    while True:
        sequenced = sequence(connection)
        yield sequenced
        if not sequenced or _is_sequenced(connection, row[0]):
            return


def _is_sequenced(connection: Connection, snapshot: str) -> bool:
    """Whether all is sequenced that is visible in the snapshot."""
    row = connection.execute(
        """
        SELECT pg_snapshot_xmax(snapshot) >= pg_snapshot_xmax(%(snapshot)s::pg_snapshot)
               AND NOT EXISTS (SELECT FROM pg_snapshot_xip(snapshot) AS unfinished
                                WHERE pg_visible_in_snapshot(unfinished, %(snapshot)s))
          FROM pg_eventstream_cursor ORDER BY position DESC LIMIT 1
        """,
        {"snapshot": snapshot},
    ).fetchone()
    return bool(row and row[0])


def last_position(connection: Connection) -> int:
    row = connection.execute(f"SELECT max(position) FROM {CURSOR} AS c").fetchone()  # noqa: S608
    return int(row[0] or 0) if row else 0


def _register(connection: Connection, name: str, proxies: list[Proxy]) -> None:
    """Write down who leads, and which proxies there are.

    A proxy that is new may be a known one under a new address, so it starts where the one
    furthest behind is; to publish an event again does no harm. But no stream needs what is older
    than ``EVENTSTREAM_NEXT_LINK_TIMEOUT``: it has asked the application since then, or its client
    comes back with the id that it holds.

    With no proxy configured those that are known stay: they may be back with the next start.
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


def _sequence_and_beat(connection: Connection, known: Cursor) -> tuple[int, Cursor]:
    """The same, and in the same statement, of which an idle publisher sends few: show that we
    are alive, and look after the queue that all notifications go through.
    """
    row = connection.execute(
        f"""
        WITH beat AS ({_BEAT})
        SELECT pg_notification_queue_usage(), sequenced.* FROM ({_SEQUENCE}) AS sequenced
        """,  # noqa: S608
        [known.as_known],
    ).fetchone()
    assert row is not None  # noqa: S101
    usage, _, sequenced, *cursor = row
    if usage > _QUEUE_USAGE_WARNING:
        logger.warning(
            "PostgreSQL's notification queue is %.0f %% full; when it is full, transactions that"
            " notify fail at COMMIT. Some session has used LISTEN and then stayed in a"
            " transaction: look for the oldest xact_start in pg_stat_activity, and end it.",
            usage * 100,
        )
    return int(sequenced), Cursor.of(*cursor)
