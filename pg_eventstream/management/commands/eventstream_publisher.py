from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING, Any

from pg_eventstream.management.base import DatabaseCommand, log_to_stderr
from pg_eventstream.management.metrics_port import add_metrics_arguments, serving_metrics
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher

if TYPE_CHECKING:
    from pg_eventstream.operate.prometheus.health import Probes
    from pg_eventstream.operate.prometheus.latest import Latest
    from pg_eventstream.operate.state import State


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
        add_metrics_arguments(parser)

    def run(self, alias: str, options: dict[str, Any]) -> None:
        log_to_stderr(options["verbosity"])
        connector = Connector(alias, options["dsn"], self.limits)
        publisher = Publisher(connector)
        if options["once"]:
            publisher.run_once(say=self.stdout.write)
            return
        if options["metrics_port"] is None:
            publisher.run()
            return

        def make_probes(state: Latest[State]) -> Probes:
            from pg_eventstream.operate.prometheus.health import Health

            return Health(publisher.vitals, connector, state)

        host, port = options["metrics_host"], options["metrics_port"]
        with serving_metrics(host, port, connector, make_probes):
            publisher.run()
