from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import connections

from pg_eventstream.conf import conf
from pg_eventstream.limits import LIMITS
from pg_eventstream.postgres.connector import Connector, explain
from pg_eventstream.publisher.pruner import Pruner


class Command(BaseCommand):
    help = (
        "Prunes events past EVENTSTREAM_RETENTION (24 hours; with None, unreliable events only), in"
        " small batches. A running eventstream_publisher does the same by itself."
    )
    requires_migrations_checks = False
    limits = LIMITS

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--database", help="database alias to connect with; default EVENTSTREAM_DATABASE"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        alias = options["database"] or conf.database_alias
        if alias not in connections:
            raise CommandError(
                f"There is no database {alias!r} in DATABASES; there are: {', '.join(connections)}."
            )
        try:
            with Connector(alias, limits=self.limits).connect(
                "prune", patience=self.limits.command_patience
            ) as connection:
                pruned = Pruner(connection).run_once()
        except ImproperlyConfigured as e:
            raise CommandError(str(e)) from e
        except psycopg.Error as e:
            raise CommandError(f"Database: {explain(e)}") from e
        self.stdout.write(f"{pruned} events pruned.")
