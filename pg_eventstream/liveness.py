"""Logs a warning if events wait for a publisher that does not run, or for a proxy.

Without a publisher, a stream behind a proxy opens as usual, but no event ever arrives. Opening a
stream checks whether a publisher runs. With ``DEBUG`` on, sending an event does so, too, and the
stream itself says what is wrong.
"""

from __future__ import annotations

import logging
import threading

import psycopg
from django.core import mail
from django.db import DatabaseError, connections

from .conf import conf, proxy_name
from .postgres.threads import run, run_later
from .rarely import Rarely

logger = logging.getLogger("pg_eventstream.liveness")

_CHECK_SECONDS = 15.0
#: A publisher updates its heartbeat every 10 seconds, and a proxy takes events at once.
LATE_SECONDS = 30.0
START = "Start it, and keep it running as a service: python manage.py eventstream_publisher"
_check_is_due = Rarely(_CHECK_SECONDS)
_rarely = Rarely()
_is_refused = threading.Event()

#: The publisher that led last. `operate` uses it as well.
PUBLISHER = """
    SELECT name, leading_since, extract(epoch FROM clock_timestamp() - heartbeat)::float8
      FROM pg_eventstream_publisher
"""


def check_publisher() -> None:
    """Check whether events reach the proxies, and log a warning if they do not.

    It checks at most once in 15 seconds per process, and warns once in ten minutes. The check runs
    later on a separate connection: the caller does not wait, and its transaction is not affected.
    Roles that may not read the publisher's state do not check. Nor do tests of a project: no
    publisher runs there, and another connection would prevent the removal of the test database.
    """
    if _check_is_due() and _can_check():
        run_later(_check)


def find_problem() -> str | None:
    """Check now, log a warning as `check_publisher` does, and return what is wrong.

    For development: the caller waits. Returns None if all is well or if it cannot be told.
    """
    if not _can_check():
        return None
    try:
        return run(_check)
    except DatabaseError:
        return None  # the stream itself needs the database, and says what is wrong with it


def _can_check() -> bool:
    # Without a proxy, the process sequences events itself.
    return not hasattr(mail, "outbox") and bool(conf.grip_proxies) and not _is_refused.is_set()


def _check() -> str | None:
    try:
        return _check_state()
    except DatabaseError as e:
        if not isinstance(e.__cause__, psycopg.errors.InsufficientPrivilege):
            raise
        _is_refused.set()  # because PostgreSQL would log each attempt
        return None


def _check_state() -> str | None:
    """Log what is wrong, and return a short form of it."""
    problem = None
    with connections[conf.database].cursor() as cursor:
        cursor.execute(PUBLISHER)
        publisher = cursor.fetchone()
        if publisher is None:
            if _rarely("never ran"):
                logger.warning(
                    "No publisher has ever run on this database, so no event is sent. %s",
                    START,
                    extra={"event": "no-publisher"},
                )
            return f"No publisher has ever run, so no event arrives. {START}"
        name, _, silent = publisher
        if silent > LATE_SECONDS:
            if _rarely("silent"):
                logger.warning(
                    "The publisher %s has shown no sign of life for %.0f seconds, and no other has"
                    " taken over, so no event is sent. %s",
                    name,
                    silent,
                    START,
                    extra={"event": "no-publisher", "publisher": name},
                )
            return f"The publisher {name} shows no sign of life, so no event arrives. {START}"
        # Reads one row per proxy by the key of the stream, for any number of waiting events. Roles
        # of web applications may read no more, so `operate.queries` measures differently.
        cursor.execute(
            """
            SELECT given.name, proxy.name IS NOT NULL,
                   (SELECT extract(epoch FROM now() - sequenced_at)::float8
                      FROM pg_eventstream_stream AS stream
                     WHERE stream.position > proxy.position
                     ORDER BY stream.position LIMIT 1)
              FROM unnest(%s::text[]) AS given (name)
              LEFT JOIN pg_eventstream_proxy AS proxy ON proxy.name = given.name
            """,
            [[proxy_name(config) for config in conf.grip_proxies]],
        )
        for proxy, known, waiting in cursor.fetchall():
            if not known:
                problem = f"The publisher {name} does not serve the proxy {proxy}."
                if _rarely("not served"):
                    logger.warning(
                        "The publisher %s sends nothing to the proxy %s. Start it with the same"
                        " GRIP_URL (or GRIP_PROXIES) as this process.",
                        name,
                        proxy,
                        extra={"event": "proxy-not-served", "publisher": name, "proxy": proxy},
                    )
            elif (waiting or 0) > LATE_SECONDS:
                problem = f"The proxy {proxy} does not take events."
                if _rarely("behind"):
                    logger.warning(
                        "Events have waited for the proxy %s for %.0f seconds. The log of the"
                        " publisher %s says why it does not take them.",
                        proxy,
                        waiting,
                        name,
                        extra={
                            "event": "proxy-behind",
                            "publisher": name,
                            "proxy": proxy,
                            "seconds": waiting,
                        },
                    )
    return problem
