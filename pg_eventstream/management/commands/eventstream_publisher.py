from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from pg_eventstream.management.base import DatabaseCommand, log_to_stderr
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher


class Command(DatabaseCommand):
    help = (
        "Forwards committed events to the GRIP proxies, in commit order. Runs until SIGTERM. If"
        " you start several, one leads and the others stand by."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        target = parser.add_mutually_exclusive_group()
        self.add_database_argument(target)
        target.add_argument(
            "--dsn",
            help="connection string to connect with instead, for example to bypass a pooler",
        )
        parser.add_argument(
            "--once",
            action="store_true",
            help="publish all events that are committed, then exit; with status 1 if some could"
            " not be published",
        )

    def run(self, alias: str, options: dict[str, Any]) -> None:
        log_to_stderr(options["verbosity"])
        publisher = Publisher(Connector(alias, options["dsn"], self.limits))
        if options["once"]:
            publisher.run_once(say=self.stdout.write)
        else:
            publisher.run()
