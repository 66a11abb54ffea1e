from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import CommandError
from django.db import Error

from pg_eventstream.management.base import DatabaseCommand, find_alias
from pg_eventstream.management.importing import Imported, import_events, missing_tables


class Command(DatabaseCommand):
    help = (
        "Copies from django-eventstream's tables the last ids of the channels, and the events"
        " younger than EVENTSTREAM_RETENTION (24 hours), so that clients resume with the ids that"
        " they hold. Run it as the owner of the tables, after django-eventstream has sent its last"
        " event and before pg_eventstream sends its first. It can be repeated. Users whom an event"
        " skipped receive it when they resume, because django-eventstream does not store who they"
        " were."
    )
    database_help = "database alias to import into; default EVENTSTREAM_DATABASE"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--from",
            dest="source",
            metavar="ALIAS",
            help="database alias with django-eventstream's tables; default EVENTSTREAM_DATABASE",
        )
        self.add_database_argument(parser)
        parser.add_argument(
            "--before-4.4",
            dest="before_4_4",
            action="store_true",
            help="the events were sent by a django-eventstream before 4.4, which stored strings"
            " differently",
        )
        parser.add_argument("--dry-run", action="store_true", help="print what would be imported")

    def run(self, alias: str, options: dict[str, Any]) -> None:
        source = find_alias(options["source"])
        try:
            if missing := missing_tables(source):
                raise CommandError(
                    f"There is nothing to import: the database {source!r} has no table"
                    f" {' and no table '.join(missing)}. If the tables are in another database,"
                    " name its alias with --from."
                )
            with self.connect(alias, "import") as connection:
                imported = import_events(
                    source,
                    connection,
                    before_4_4=options["before_4_4"],
                    dry_run=options["dry_run"],
                    say=self.stdout.write,
                )
        except Error as e:
            raise CommandError(f"Database {source!r}: {e}") from e
        for line in _summarize(imported, dry_run=options["dry_run"]):
            self.stdout.write(line)


def _summarize(imported: Imported, *, dry_run: bool) -> list[str]:
    would = "would be " if dry_run else ""
    lines = [
        f"{imported.channels} channels {would}imported, with {imported.events} events to"
        " resume from."
    ]
    if imported.before_gaps:
        lines.append(
            f"{imported.before_gaps} events left out, because a later event of their channel is"
            " missing."
        )
    if imported.unusable:
        lines.append(
            f"{imported.unusable} events count as missing, because they cannot be stored here: NUL"
            " in the data, data that is not JSON, or a type of more than 255 characters."
        )
    if imported.known:
        lines.append(
            f"{len(imported.known)} channels left unchanged, because they already have events"
            f" here, imported or new: {_join_names(imported.known)}."
        )
    lines += [f"Channel {name!r} left out: {why}" for name, why in imported.refused.items()]
    return lines


def _join_names(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more
