from __future__ import annotations

import logging
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from django.core.management.base import CommandError

from pg_eventstream.management.base import DatabaseCommand, log_to_stderr
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.publisher.vitals import Vitals

logger = logging.getLogger("pg_eventstream.metrics")


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

        parser.add_argument(
            "--metrics-port",
            type=int,
            help="serve /metrics for Prometheus, and the probes /live and /ready, on this port",
        )
        parser.add_argument(
            "--metrics-host",
            default="127.0.0.1",
            help="the address of that port; default 127.0.0.1, which is this machine alone",
        )

    def run(self, alias: str, options: dict[str, Any]) -> None:
        log_to_stderr(options["verbosity"])
        connector = Connector(alias, options["dsn"], self.limits)
        publisher = Publisher(connector)
        if options["once"]:
            publisher.run_once(say=self.stdout.write)
            return
        with ExitStack() as stack:
            if options["metrics_port"] is not None:
                host, port = options["metrics_host"], options["metrics_port"]
                stack.enter_context(_serve(host, port, publisher.vitals, connector))
            publisher.run()


@contextmanager
def _serve(host: str, port: int, vitals: Vitals, connector: Connector) -> Iterator[None]:
    try:
        from pg_eventstream.operate.prometheus.health import Health
        from pg_eventstream.operate.prometheus.metrics import latest_state, registry
        from pg_eventstream.operate.prometheus.server import serving
    except ImportError as e:
        raise CommandError(
            "--metrics-port needs prometheus-client. Install it with: pip install"
            " 'pg-eventstream[metrics]'"
        ) from e
    state = latest_state(connector)
    server = serving(
        host, port, registry(state, with_counters=True), Health(vitals, connector, state)
    )
    with ExitStack() as stack:
        try:
            stack.enter_context(server)
        except (OSError, OverflowError) as e:
            raise CommandError(
                f"--metrics-port: cannot listen on {host}, port {port}: {e}. Choose another port,"
                " or end the process that uses it."
            ) from e
        logger.info(
            "metrics and probes on http://%s:%s/metrics, /live, /ready",
            host,
            port,
            extra={"event": "metrics-served", "host": host, "port": port},
        )
        yield
