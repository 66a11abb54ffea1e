"""Consumers with a trivial handler.

BENCHMARK_CONSUMERS is their number, BENCHMARK_BATCH their batch, BENCHMARK_START where they begin.
"""

from __future__ import annotations

import os

from pg_eventstream.consumers import ConsumedEvent, consumer
from pg_eventstream.consumers.declaration import Start

from .. import consuming

START: Start = "earliest" if os.environ.get("BENCHMARK_START") == "earliest" else "latest"
BATCH = int(os.environ.get("BENCHMARK_BATCH", "1"))


def handle(event: ConsumedEvent) -> None:
    consuming.handle(event.position)


for number in range(int(os.environ.get("BENCHMARK_CONSUMERS", "1"))):
    consumer(f"batch-{BATCH}-{number}", batch=BATCH, start=START)(handle)
