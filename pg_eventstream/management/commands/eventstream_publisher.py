from __future__ import annotations

import logging
from argparse import ArgumentParser
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import connections

from pg_eventstream.conf import conf
from pg_eventstream.errors import NotLeading, NotPublished
from pg_eventstream.limits import LIMITS
from pg_eventstream.postgres.connector import Connector, explain
from pg_eventstream.publisher.daemon import Publisher


class Command(BaseCommand):
    help = (
        "Forwards committed events to the GRIP proxies, in commit order. Runs until SIGTERM;"
        " start several and one leads while the others stand by."
    )
    requires_migrations_checks = False
    limits = LIMITS

    def add_arguments(self, parser: ArgumentParser) -> None:
        where = parser.add_mutually_exclusive_group()
        where.add_argument(
            "--database",
            help="database alias to connect with; default EVENTSTREAM_DATABASE",
        )
        where.add_argument(
            "--dsn",
            help="connection string to connect with instead, for instance past a pooler",
        )
        parser.add_argument(
            "--once",
            action="store_true",
            help="publish what is there, then exit; 1 if something could not be published",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        alias = options["database"] or conf.database_alias
        if alias not in connections:
            raise CommandError(
                f"There is no database {alias!r} in DATABASES; there are: {', '.join(connections)}."
            )
        _log_to_stderr(options["verbosity"])
        try:
            publisher = Publisher(Connector(alias, options["dsn"], self.limits), self.limits)
            if options["once"]:
                publisher.run_once(say=self.stdout.write)
            else:
                publisher.run()
        except (NotLeading, NotPublished, ImproperlyConfigured) as e:
            raise CommandError(str(e)) from e
        except psycopg.Error as e:
            raise CommandError(f"Database: {explain(e)}") from e


def _log_to_stderr(verbosity: int) -> None:
    """A daemon that says nothing is no help: log, unless the project set up logging for us."""
    logger = logging.getLogger("pg_eventstream")
    if logger.hasHandlers() or verbosity == 0:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
