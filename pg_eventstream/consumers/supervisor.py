"""Starts the processes that run consumers, and replaces those that end."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from ..backoff import Backoff
from ..errors import EventStreamError
from ..limits import LIMITS, Limits
from .worker import HANGS, Worker

logger = logging.getLogger(__name__)

#: The exit status of a process that cannot work, so that a new one could not either.
_REFUSED = 2
_STOPPING = {signal.SIGTERM, signal.SIGINT}
# After this time a process counts as having worked.
_WORKED_SECONDS = 10.0
_KILL_SECONDS = 5.0
_STOP, _END = b"s", b"e"


@contextmanager
def stopping_on(
    numbers: Iterable[int], stop: Callable[[], object], *, once: bool
) -> Iterator[None]:
    """Call ``stop`` when one of these signals arrives, on a thread of its own.

    A signal handler interrupts the main thread anywhere, also where it holds a lock that ``stop``
    needs. With ``once``, a second signal ends the process at once; otherwise it is ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only there are signals handled
        return
    reader, writer = os.pipe()
    arrived = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        if arrived and once:
            os._exit(128 + number)
        arrived = True
        os.write(writer, _STOP)

    def wait() -> None:
        if os.read(reader, 1) == _STOP:
            stop()

    thread = threading.Thread(target=wait, name="signals", daemon=True)
    thread.start()
    previous = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.write(writer, _END)
        thread.join()
        os.close(reader)
        os.close(writer)


class Supervisor:
    """Runs ``make_worker()`` in a number of processes, until it gets SIGTERM or SIGINT.

    A process that ends is replaced; with a growing delay, if it has not worked. The processes end
    when this one dies. ``serve`` runs in a process of its own beside them, because this one must
    have no threads when it starts others.
    """

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        processes: int,
        limits: Limits = LIMITS,
        serve: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        self._make_worker = make_worker
        self._processes = processes
        self._limits = limits
        self._serve = serve
        self._server: int | None = None
        self._started: dict[int, float] = {}
        self._stopping = False
        self._refused = False

    def run(self) -> bool:
        """Returns False if the processes could not work."""
        connections.close_all()  # no process may use a connection of another
        # The processes read it: it ends when this process ends.
        alive_reader, alive_writer = os.pipe()
        wake_reader, wake_writer = os.pipe()
        os.set_blocking(wake_writer, False)
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (*_STOPPING, signal.SIGCHLD)
        }
        previous_fd = signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        backoff = Backoff(*self._limits.reconnect)
        start_at = 0.0
        try:
            while not self._stopping:
                now = time.monotonic()
                if now >= start_at:
                    if self._serve is not None and self._server is None:
                        self._server = self._start(self._work_as_server, alive_reader, alive_writer)
                    others = self._server is not None
                    while len(self._started) < self._processes + others and not self._stopping:
                        self._start(self._work, alive_reader, alive_writer)
                select.select([wake_reader], [], [], max(0.0, start_at - now) or None)
                if select.select([wake_reader], [], [], 0)[0]:
                    os.read(wake_reader, 1024)
                for status, seconds in self._reap():
                    if status == _REFUSED:
                        self._refused = self._stopping = True
                    elif status == HANGS or seconds >= _WORKED_SECONDS:
                        backoff.reset()
                        start_at = 0.0
                    else:
                        start_at = time.monotonic() + backoff.next()
            self._end()
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            for end in (alive_reader, alive_writer, wake_reader, wake_writer):
                os.close(end)
        return not self._refused

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number not in _STOPPING:
            return
        if self._stopping:
            for pid in self._started:
                os.kill(pid, signal.SIGKILL)
            os._exit(128 + number)
        self._stopping = True

    def _start(self, work: Callable[[int], int], alive_reader: int, alive_writer: int) -> int:
        """Start a process that does this work. Returns its pid."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            self._started[pid] = time.monotonic()
            return pid
        status = 1
        try:
            os.close(alive_writer)
            status = work(alive_reader)
        except BaseException:
            logger.exception(
                "consumers: unexpected error",
                extra={"event": "unexpected-error", "part": "consumers"},
            )
        finally:
            logging.shutdown()
            os._exit(status)

    def _work(self, alive_reader: int) -> int:
        """What a process does. Returns its exit status."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            worker = self._make_worker()
        except (EventStreamError, ImproperlyConfigured) as e:
            return _refuse(e)

        def end_with_parent() -> None:
            os.read(alive_reader, 1)
            worker.stop()

        threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
        try:
            with stopping_on([signal.SIGTERM], worker.stop, once=False):
                worker.run()
        except (EventStreamError, ImproperlyConfigured) as e:
            return _refuse(e)
        return 0

    def _work_as_server(self, alive_reader: int) -> int:
        """What the process does that serves metrics. Returns its exit status."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert self._serve is not None  # noqa: S101
        try:
            with self._serve():
                os.read(alive_reader, 1)
        except (EventStreamError, ImproperlyConfigured) as e:
            return _refuse(e)
        return 0

    def _reap(self) -> list[tuple[int, float]]:
        """The exit statuses of processes that have ended, and how many seconds they ran."""
        ended = []
        for pid, started in list(self._started.items()):
            done, code = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            del self._started[pid]
            if pid == self._server:
                self._server = None
            status = os.waitstatus_to_exitcode(code)
            ended.append((status, time.monotonic() - started))
            if not self._stopping and status != _REFUSED:
                logger.warning(
                    "consumers: process %d ended with status %d; starting another",
                    pid,
                    status,
                    extra={"event": "process-replaced", "pid": pid, "status": status},
                )
        return ended

    def _end(self) -> None:
        """Let the processes finish their transactions, and end those that do not."""
        for pid in self._started:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + self._limits.handler + _KILL_SECONDS
        while self._started and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.02)
        for pid in self._started:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _refuse(error: Exception) -> int:
    logger.error("consumers: %s", error, extra={"event": "consumers-refused"})
    return _REFUSED
