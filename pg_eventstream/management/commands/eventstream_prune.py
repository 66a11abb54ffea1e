from __future__ import annotations

from typing import Any

from pg_eventstream.management.base import DatabaseCommand
from pg_eventstream.postgres.connector import COMMAND_PATIENCE, Database
from pg_eventstream.publisher.pruner import Sweep


class Command(DatabaseCommand):
    help = (
        "Deletes events older than EVENTSTREAM_RETENTION (24 hours; with None, only unreliable"
        " events), in small batches. A running eventstream_publisher does this as well."
    )

    def run(self, alias: str, options: dict[str, Any]) -> None:
        with Database(alias).connect("prune", patience=COMMAND_PATIENCE) as connection:
            pruned = Sweep(connection).run_once()
        self.stdout.write(f"{pruned} events pruned.")
