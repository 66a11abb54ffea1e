"""One process that runs consumers: a thread for each, and this loop, which watches over them."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, MutableSequence
from contextlib import closing, suppress
from mmap import mmap
from typing import Any, NamedTuple

import django.db
import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from ..backoff import Backoff
from ..checks import first_use
from ..conf import conf
from ..errors import ConsumerStopped, UnknownConsumer
from ..postgres.connector import Connector, explain, fetch_one, plain_sql
from ..postgres.listener import BELL, CONSUMERS, NEWS
from ..postgres.report import consumer_report, write_report
from ..postgres.sequence import reached
from ..postgres.watchdog import WatchedConnection
from . import checkpoints
from .declaration import Declaration
from .event import event_id
from .parked import is_requested
from .runner import Runner
from .share import Share
from .waiting import refuse_in_transaction, unhandled

logger = logging.getLogger(__name__)

_ONCE_POLL = 0.05
#: The exit status of a process that was ended because a handler took too long.
HANGS = 75


def holder_name() -> str:
    """The name of this process in the tables: host, pid, and what makes it unique."""
    return f"{socket.gethostname()}:{os.getpid()}/{secrets.token_hex(3)}"


class Progress(NamedTuple):
    """How far `Worker.run_once` is."""

    #: The events that this process has handled.
    handled: int
    #: The positions of the stream that are left, whether or not their events are to be handled.
    left: int
    #: The part that is done, 0 to 1.
    share: float


class Worker:
    """Runs consumers until `stop` is called.

    ``alias`` is the database of the events, on which handlers run. ``connector`` is where its
    locks are held, which must be the same database over a direct connection.

    ``known`` is shared by the processes that replace each other. It has a byte for each consumer,
    which is 1 once it is stored: if it is missing after that, it was removed, and is not created
    again.
    """

    def __init__(
        self,
        consumers: Iterable[Declaration],
        alias: str,
        connector: Connector | None = None,
        known: MutableSequence[int] | mmap | None = None,
    ) -> None:
        first_use.report()
        conf.check_numbers()
        self._alias = alias
        self._connector = connector or Connector(alias)
        self._limits = self._connector.limits
        self._consumers = list(consumers)
        self._known = bytearray(len(self._consumers)) if known is None else known
        self._stopping = threading.Event()
        self._share: Share | None = None
        self._runners: list[Runner] = []
        self._threads: list[threading.Thread] = []
        self.holder = holder_name()

    def stop(self) -> None:
        """Finish the transactions of the handlers, and return from `run`."""
        self._stopping.set()
        for runner in self._runners:
            runner.stop()
        share = self._share
        if share is not None:
            share.listener.wake()

    @property
    def is_stopped(self) -> bool:
        return self._stopping.is_set()

    def run(self) -> None:
        """Handle events until stopped. Errors of the database do not end it.

        Consumers that were renamed or removed are left out. Raises `UnknownConsumer` if no other is
        left, and `NeedsDirectConnection`.
        """
        backoff = Backoff(*self._limits.reconnect)
        connection_created.connect(_notice_death)
        try:
            while not self._stopping.is_set():
                try:
                    with self._connector.connect("consumers") as connection:
                        self._start(connection)
                        backoff.reset()
                        self._work(connection)
                except psycopg.Error as e:
                    if self._stopping.is_set():
                        break
                    logger.warning(
                        "consumers: database: %s; connecting again",
                        explain(e),
                        extra={"event": "database-lost", "part": "consumers"},
                    )
                for runner in self._runners:
                    runner.lose()
                self._stopping.wait(backoff.next() if not self._stopping.is_set() else 0)
        finally:
            self._end()
            connection_created.disconnect(_notice_death)

    def _start(self, connection: WatchedConnection) -> None:
        if self._runners:
            return
        runners: list[Runner] = []
        gone: list[UnknownConsumer] = []
        for nth, consumer in enumerate(self._consumers):
            try:
                consumer_id = checkpoints.register(
                    connection, consumer, create=not self._known[nth]
                )
            except UnknownConsumer as e:
                gone.append(e)
                logger.warning(
                    "consumer %s: %s",
                    consumer.name,
                    e,
                    extra={"event": "consumer-gone", "consumer": consumer.name},
                )
                continue
            self._known[nth] = 1
            runners.append(Runner(consumer, consumer_id, self._alias, self.holder, self._limits))
        if not runners:
            raise UnknownConsumer(" ".join(map(str, gone)))
        self._runners = runners
        self._threads = [
            threading.Thread(
                target=runner.run, name=f"consumer {runner.consumer.name}", daemon=True
            )
            for runner in runners
        ]
        for thread in self._threads:
            thread.start()
        logger.info(
            "consumers %s: %s: running",
            self.holder,
            ", ".join(runner.consumer.name for runner in runners),
            extra={"event": "consumers-running", "holder": self.holder},
        )

    def _work(self, connection: WatchedConnection) -> None:
        self._share = share = Share(connection, self._runners)
        with closing(share):
            rung = {BELL, NEWS, CONSUMERS}
            beat_at = poll_at = balance_at = time.monotonic()
            while not self._stopping.is_set():
                now = time.monotonic()
                if now >= poll_at:
                    # The safety poll, in case a notification was lost.
                    poll_at = now + (conf.safety_poll or float("inf"))
                    rung |= {BELL, NEWS}
                if BELL in rung:
                    share.sequence()
                if rung:
                    for runner in self._runners:
                        runner.wake(requests=CONSUMERS in rung)
                # Not with each notification: it reads the locks of the server.
                if now >= balance_at:
                    balance_at = now + self._limits.share
                    share.balance()
                if now >= beat_at:
                    beat_at = now + self._limits.heartbeat
                    self._beat(connection)
                self._end_if_hanging(connection)
                rung = share.listener.wait(self._limits.share)
        self._share = None

    def _beat(self, connection: WatchedConnection) -> None:
        """Write down which runners are at work; and of one whose handler hangs, at which event."""
        now = time.monotonic()
        held: list[tuple[int, int]] = []
        for runner in self._runners:
            working = runner.working
            moved_at = runner.moved_at if working is None else max(runner.moved_at, working[1])
            if runner.waits or moved_at >= now - self._limits.heartbeat:
                held += [(runner.consumer_id, slot) for slot in runner.slots]
            elif working is not None:
                row, since = working
                content = {
                    "holder": self.holder,
                    "event": event_id(row.channel, row.number),
                    "seconds": now - since,
                }
                write_report(connection, consumer_report(runner.consumer_id), content)
        if held:
            checkpoints.beat(connection, held, self.holder)

    def _end_if_hanging(self, connection: WatchedConnection) -> None:
        """End the process if a handler has worked on an event for too long."""
        for runner in self._runners:
            working, timeout = runner.working, runner.consumer.timeout
            if working is None or timeout is None:
                continue
            row, since = working
            if time.monotonic() < since + timeout:
                continue
            logger.error(
                "consumer %s: event %s: its handler has not returned after %g seconds; this"
                " process ends, and another takes over",
                runner.consumer.name,
                event_id(row.channel, row.number),
                timeout,
                extra={
                    "event": "handler-hangs",
                    "consumer": runner.consumer.name,
                    "position": row.position,
                },
            )
            runner.note_hanging(connection, row, _stack_of(runner.thread_id))
            for other in self._runners:
                checkpoints.release(connection, other.consumer_id, other.slots, self.holder)
            logging.shutdown()
            os._exit(HANGS)

    def run_once(self, show: Callable[[Progress], object] = lambda progress: None) -> int:
        """Handle all events that are committed by now. Returns how many this process has handled.

        Slots that other processes have are left to these, and waited for. `stop` ends it earlier.
        ``show`` is called several times a second with how far it is.

        Raises `ConsumerStopped` if a consumer is paused or has stopped at an event, and what `run`
        raises.
        """
        patience = self._limits.command_patience
        connection_created.connect(_notice_death)
        try:
            with self._connector.connect("consumers", patience=patience) as connection:
                self._start(connection)
                with closing(Share(connection, self._runners)) as share:
                    self._share = share
                    position = _sequence_committed(connection, share)
                    share.balance()
                    for runner in self._runners:
                        runner.wake(requests=True)
                    consumers = [runner.consumer for runner in self._runners]
                    ids = [runner.consumer_id for runner in self._runners]
                    began = dict[Runner, int]()
                    look_at = time.monotonic()
                    while not self._stopping.is_set():
                        # They also read what they do not follow: otherwise it counts as not
                        # handled. Looking at the tables can cost a lot.
                        has_read = all(runner.has_read(position) for runner in self._runners)
                        if has_read and (now := time.monotonic()) >= look_at:
                            if not any(
                                unhandled(connection, one, position) for one in consumers
                            ) and not is_requested(connection, ids):
                                break
                            _refuse_stopped(connection, consumers, position)
                            look_at = now + 20 * (time.monotonic() - now)
                        share.balance()
                        _refuse_gone(self._runners)
                        self._end_if_hanging(connection)
                        show(self._progress(began, position))
                        share.listener.wait(_ONCE_POLL)
        finally:
            self._share = None
            self._end()
            connection_created.disconnect(_notice_death)
        return sum(runner.handled for runner in self._runners)

    def _progress(self, began: dict[Runner, int], position: int) -> Progress:
        left = 0
        for runner in self._runners:
            reached = min(runner.reached(), default=None)
            if reached is not None:
                began.setdefault(runner, reached)
                left += max(0, position - reached)
        total = sum(max(0, position - reached) for reached in began.values())
        handled = sum(runner.handled for runner in self._runners)
        return Progress(handled, left, 1 - left / total if total else 0.0)

    def _end(self) -> None:
        for runner in self._runners:
            runner.stop()
        deadline = time.monotonic() + self._limits.handler
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
        working = [
            runner
            for runner, thread in zip(self._runners, self._threads, strict=True)
            if thread.is_alive()
        ]
        if not working:
            return
        names = ", ".join(runner.consumer.name for runner in working)
        logger.warning(
            "consumers %s: stopped while %s handled an event, whose transaction is rolled back",
            self.holder,
            names,
            extra={"event": "consumers-stopped", "holder": self.holder},
        )
        # This is no fault of the event, so that no attempt is to be counted.
        with suppress(psycopg.Error), self._connector.connect("consumers", patience=1) as other:
            for runner in working:
                checkpoints.release(other, runner.consumer_id, runner.slots, self.holder)


def _stack_of(thread_id: int | None) -> str:
    frame = sys._current_frames().get(thread_id or 0)
    return "".join(traceback.format_stack(frame)) if frame else ""


def _notice_death(connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    """Let PostgreSQL end statements of this process soon after it has died.

    Otherwise they would keep their locks until they end, and nobody could take over.
    """
    # A pooler's session is not this process's alone.
    if connection.vendor == "postgresql" and checkpoints.own_pid(connection.connection):
        with suppress(django.db.Error), connection.cursor() as cursor:
            cursor.execute("SET client_connection_check_interval = '1s'")


def drain(consumer: Declaration) -> int:
    """See `Consumer.drain`."""
    alias = conf.database
    refuse_in_transaction(alias, "drain()")
    connector = Connector(alias)
    with connector.connect("consumers", patience=connector.limits.command_patience) as connection:
        consumer_id = checkpoints.register(connection, consumer)
        runner = Runner(consumer, consumer_id, alias, holder_name(), connector.limits)
        runner.raises = True
        with closing(Share(connection, [runner])) as share:
            try:
                position = _sequence_committed(connection, share)
                share.balance()
                # Also read what it does not follow: otherwise that counts as not handled.
                while not runner.has_read(position) or unhandled(connection, consumer, position):
                    share.balance()
                    if runner.step() or not runner.slots:
                        _refuse_gone([runner])
                        _refuse_stopped(connection, [consumer], position)
                        share.listener.wait(_ONCE_POLL)
            finally:
                runner.close()
    return runner.handled


def _sequence_committed(connection: WatchedConnection, share: Share) -> int:
    """Wait until all events that are committed now are in order. Returns the last position."""
    (snapshot,) = fetch_one(connection, "SELECT pg_current_snapshot()::text")
    deadline = time.monotonic() + connection.limits.command_patience
    while True:
        share.sequence()
        position = reached(connection, snapshot)
        if position is not None:
            return position
        if time.monotonic() >= deadline:
            raise ConsumerStopped(
                "Committed events are not put in order: no publisher does it, and this role may"
                " not. Start eventstream_publisher, or grant this role the rights of a sequencer"
                f" ({plain_sql()}/grants.sql)."
            )
        share.listener.wait(_ONCE_POLL)


def _refuse_gone(runners: list[Runner]) -> None:
    for runner in runners:
        if runner.gone:
            raise ConsumerStopped(f"The consumer {runner.consumer.name!r}: {runner.gone}.")


def _refuse_stopped(
    connection: WatchedConnection, consumers: list[Declaration], position: int
) -> None:
    """Raise `ConsumerStopped` if nothing but paused and stopped slots is left."""
    reasons: list[str] = []
    for consumer in consumers:
        left = unhandled(connection, consumer, position)
        rows = connection.execute(
            """
            SELECT slot, paused, error
              FROM pg_eventstream_consumer AS k JOIN pg_eventstream_slot ON consumer_id = k.id
             WHERE name = %s AND slot = ANY(%s) AND (paused OR stopped)
            """,
            [consumer.name, list(left)],
        ).fetchall()
        if {slot for slot, _, _ in rows} != left:
            return
        if any(paused for _, paused, _ in rows):
            reasons.append(
                f"The consumer {consumer.name!r} is paused. To let it continue: manage.py"
                f" eventstream_consumers resume {consumer.name}"
            )
        else:
            reasons += [
                f"The consumer {consumer.name!r} has stopped (slot {slot}): {error}"
                for slot, _, error in rows
            ]
    if reasons:
        raise ConsumerStopped("\n".join(reasons))
