from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import CommandError

from ...consumers.declare import Consumer, discover
from ...consumers.supervisor import Supervisor
from ...consumers.worker import Worker
from ...postgres.connector import Connector
from ..base import DatabaseCommand, log_to_stderr


class Command(DatabaseCommand):
    help = "Runs durable consumers, and shows and changes how far they are."

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
        run = commands.add_parser("run", help="handle events until stopped")
        run.add_argument("names", nargs="*", metavar="NAME", help="default: all consumers")
        run.add_argument(
            "--processes", type=int, default=1, metavar="N", help="share the work among N processes"
        )
        run.add_argument(
            "--once", action="store_true", help="handle what is committed by now, and end"
        )
        run.add_argument(
            "--dsn",
            help="libpq connection string for the locks, where the alias leads through a pooler",
        )
        self.add_database_argument(run)

    def run(self, alias: str, options: dict[str, Any]) -> None:
        log_to_stderr(options["verbosity"])
        consumers = _choose(options["names"])
        connector = Connector(alias, options["dsn"], self.limits)

        def make_worker() -> Worker:
            return Worker(consumers, alias, connector)

        if options["once"]:
            handled = make_worker().run_once()
            self.stdout.write(f"{handled:,} events handled.")
        elif not Supervisor(make_worker, options["processes"], self.limits).run():
            raise CommandError("The consumers cannot run; the reason is in the log.")


def _choose(names: list[str]) -> list[Consumer]:
    consumers = discover()
    if unknown := [name for name in names if name not in consumers]:
        raise CommandError(
            f"There is no consumer {', '.join(map(repr, unknown))} in the code. There are:"
            f" {', '.join(consumers) or 'none'}."
        )
    chosen = [consumers[name] for name in names] if names else [*consumers.values()]
    if not chosen:
        raise CommandError(
            "No consumer is declared. Declare one with @consumer in the module event_consumers of"
            " an installed app."
        )
    return chosen
