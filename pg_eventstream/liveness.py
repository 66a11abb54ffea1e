"""Logs a warning if events wait for a publisher that does not run, or for a proxy.

Without a publisher, a stream behind a proxy opens as usual, but no event ever arrives. Opening a
stream checks whether a publisher runs; with ``DEBUG`` on, sending an event does, too.
"""

from __future__ import annotations

import logging

import psycopg
from django.core import mail
from django.db import DatabaseError, connections

from .conf import conf, proxy_name
from .postgres.threads import run_later
from .rarely import Rarely

logger = logging.getLogger("pg_eventstream.liveness")

_CHECK_SECONDS = 15.0
#: A publisher updates its heartbeat every 10 seconds, and a proxy takes events at once.
LATE_SECONDS = 30.0
START = "Start it, and keep it running as a service: python manage.py eventstream_publisher"
_check_is_due = Rarely(_CHECK_SECONDS)
_rarely = Rarely()


def check_publisher() -> None:
    """Check whether events reach the proxies, and log a warning if they do not.

    It checks at most once in 15 seconds per process, and warns once in ten minutes. The check runs
    later on a separate connection: the caller does not wait, and its transaction is not affected.
    Roles that may not read the publisher's state do not check. Nor do tests of a project: no
    publisher runs there, and another connection would prevent the removal of the test database.
    """
    if not _check_is_due() or hasattr(mail, "outbox"):  # in a test
        return
    if conf.grip_proxies:  # without a proxy, the process sequences events itself
        run_later(_check)


def _check() -> None:
    try:
        _check_state()
    except DatabaseError as e:
        if not isinstance(e.__cause__, psycopg.errors.InsufficientPrivilege):
            raise
        _check_is_due.never_again()  # because PostgreSQL would log each attempt


def _check_state() -> None:
    with connections[conf.database].cursor() as cursor:
        cursor.execute(
            "SELECT name, extract(epoch FROM now() - heartbeat)::float8"
            "  FROM pg_eventstream_publisher"
        )
        publisher = cursor.fetchone()
        if publisher is None:
            if _rarely("never ran"):
                logger.warning(
                    "No publisher has ever run on this database, so no event is sent. %s",
                    START,
                    extra={"event": "no-publisher"},
                )
            return
        name, silent = publisher
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
            return
        # Reads one row per proxy by the key of the stream, for any number of waiting events.
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
                if _rarely("not served"):
                    logger.warning(
                        "The publisher %s sends nothing to the proxy %s. Start it with the same"
                        " GRIP_URL (or GRIP_PROXIES) as this process.",
                        name,
                        proxy,
                        extra={"event": "proxy-not-served", "publisher": name, "proxy": proxy},
                    )
            elif (waiting or 0) > LATE_SECONDS and _rarely("behind"):
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
