from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import Error, connections

from pg_eventstream.conf import conf
from pg_eventstream.limits import LIMITS
from pg_eventstream.management.importing import Imported, import_events, missing_tables
from pg_eventstream.postgres.connector import Connector, explain


class Command(BaseCommand):
    help = (
        "Takes over from django-eventstream's tables the channels' last ids, and the events"
        " younger than EVENTSTREAM_RETENTION (24 hours), so that clients resume with the ids that"
        " they hold. Run it as the owner of the tables, after the last event was sent by"
        " django-eventstream and before the first is sent by pg_eventstream. Repeating it does"
        " no harm. Users whom an event skipped get it when they resume: django-eventstream has"
        " not stored who they were."
    )
    requires_migrations_checks = False
    limits = LIMITS

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--from",
            dest="source",
            metavar="ALIAS",
            help="database alias with django-eventstream's tables; default EVENTSTREAM_DATABASE",
        )
        parser.add_argument(
            "--database", help="database alias to import into; default EVENTSTREAM_DATABASE"
        )
        parser.add_argument(
            "--before-4.4",
            dest="before_4_4",
            action="store_true",
            help="the events were sent by a django-eventstream before 4.4, which stored strings"
            " in another way",
        )
        parser.add_argument("--dry-run", action="store_true", help="say what would be imported")

    def handle(self, *args: Any, **options: Any) -> None:
        source = options["source"] or conf.database_alias
        target = options["database"] or conf.database_alias
        for alias in (source, target):
            if alias not in connections:
                raise CommandError(
                    f"There is no database {alias!r} in DATABASES; there are:"
                    f" {', '.join(connections)}."
                )
        try:
            if missing := missing_tables(source):
                raise CommandError(
                    f"Nothing to import: the database {source!r} has no table"
                    f" {' and no table '.join(missing)}. If they are in another one, name its"
                    " alias with --from."
                )
            with Connector(target, limits=self.limits).connect(
                "import", patience=self.limits.command_patience
            ) as connection:
                imported = import_events(
                    source,
                    connection,
                    before_4_4=options["before_4_4"],
                    dry_run=options["dry_run"],
                    say=self.stdout.write,
                )
        except ImproperlyConfigured as e:
            raise CommandError(str(e)) from e
        except psycopg.Error as e:
            raise CommandError(f"Database: {explain(e)}") from e
        except Error as e:
            raise CommandError(f"Database {source!r}: {e}") from e
        for line in _summary(imported, dry_run=options["dry_run"]):
            self.stdout.write(line)


def _summary(imported: Imported, *, dry_run: bool) -> list[str]:
    would = "would be " if dry_run else ""
    lines = [
        f"{imported.channels} channels {would}imported, with {imported.events} events to"
        " resume from."
    ]
    if imported.behind_gaps:
        lines.append(
            f"{imported.behind_gaps} events left out: a later one of their channel is missing."
        )
    if imported.unusable:
        lines.append(
            f"{imported.unusable} events count as missing, since they cannot be stored here: NUL"
            " in the data, data that is not JSON, or a type of more than 255 characters."
        )
    if imported.known:
        lines.append(
            f"{len(imported.known)} channels left as they are, because they have events here"
            f" already, imported or new: {_names(imported.known)}."
        )
    lines += [f"Channel {name!r} left out: {why}" for name, why in imported.refused.items()]
    return lines


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more
