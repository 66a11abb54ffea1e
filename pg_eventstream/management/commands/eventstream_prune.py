from __future__ import annotations

from typing import Any

from pg_eventstream.management.base import DatabaseCommand
from pg_eventstream.publisher.pruner import Pruner


class Command(DatabaseCommand):
    help = (
        "Deletes events older than EVENTSTREAM_RETENTION (24 hours; with None, only unreliable"
        " events), in small batches. A running eventstream_publisher does this as well."
    )

    def run(self, alias: str, options: dict[str, Any]) -> None:
        with self.connect(alias, "prune") as connection:
            pruned = Pruner(connection).run_once()
        self.stdout.write(f"{pruned} events pruned.")
