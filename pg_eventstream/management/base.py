"""Shared by the management commands: ``--database``, messages for errors, and the log."""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import connections

from ..conf import conf
from ..errors import EventStreamError
from ..limits import LIMITS, Limits
from ..postgres.connector import Connector, explain
from ..postgres.watchdog import WatchedConnection


class DatabaseCommand(BaseCommand):
    """A command that uses the database of the events. Subclasses implement `run`.

    A wrong setting, an error of the database and an `EventStreamError` end the command with
    their message instead of a traceback.
    """

    limits: Limits = LIMITS
    database_help = "database alias to connect with; default EVENTSTREAM_DATABASE"

    def add_arguments(self, parser: ArgumentParser) -> None:
        self.add_database_argument(parser)

    def add_database_argument(self, parser: Any) -> None:
        """Add ``--database`` to a parser, or to a group of one."""
        parser.add_argument("--database", help=self.database_help)

    def handle(self, *args: Any, **options: Any) -> None:
        alias = find_alias(options["database"])
        try:
            self.run(alias, options)
        except (EventStreamError, ImproperlyConfigured) as e:
            raise CommandError(str(e)) from e
        except psycopg.Error as e:
            raise CommandError(f"Database: {explain(e)}") from e

    def connect(self, alias: str, role: str) -> WatchedConnection:
        """Connect for a command that is meant to end, and so waits only for a while."""
        connector = Connector(alias, limits=self.limits)
        return connector.connect(role, patience=self.limits.command_patience)

    def run(self, alias: str, options: dict[str, Any]) -> None:
        """Do the work of the command in the database ``alias``."""
        raise NotImplementedError


def find_alias(option: str | None) -> str:
    """The alias given by an option, or else EVENTSTREAM_DATABASE.

    Raises `CommandError` if it is not in DATABASES.
    """
    alias = option or conf.database_alias
    if alias not in connections:
        raise CommandError(
            f"The database {alias!r} is not in DATABASES. The aliases there are:"
            f" {', '.join(connections)}."
        )
    return alias


def log_to_stderr(verbosity: int) -> None:
    """Log to stderr as ``--verbosity`` says, unless the project configures the logger itself."""
    logger = logging.getLogger("pg_eventstream")
    if logger.hasHandlers() or verbosity == 0:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
