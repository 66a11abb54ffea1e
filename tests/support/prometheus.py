"""A real Prometheus that scrapes a port several times a second."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pg_eventstream.servers.processes import HOST, Process, free_port
from tests.support.programs import installed


class Prometheus:
    def __init__(self, port: int) -> None:
        self.port = port

    def _get(self, path: str, **query: str) -> Any:
        url = f"http://{HOST}:{self.port}/api/v1/{path}?{urlencode(query)}"
        with urllib.request.urlopen(url, timeout=20) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that a query finds now. A wrong one raises HTTPError."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    @property
    def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        alerts = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


@contextmanager
def prometheus(scraped: int, directory: Path, alerts: str, token: str = "") -> Iterator[Prometheus]:
    """Run Prometheus with these rules, which fire as soon as their expressions are true.

    With a token it sends this, as the view requires.
    """
    port = free_port()
    (directory / "alerts.yml").write_text(re.sub(r"(?m)^ +for: .*\n", "", alerts))
    configuration = directory / "prometheus.yml"
    configuration.write_text(
        "global: {scrape_interval: 300ms, scrape_timeout: 300ms, evaluation_interval: 300ms}\n"
        "rule_files: [alerts.yml]\n"
        "scrape_configs:\n"
        "  - job_name: eventstream\n"
        f"    static_configs: [{{targets: ['{HOST}:{scraped}']}}]\n"
        + (f"    authorization: {{credentials: '{token}'}}\n" if token else "")
    )
    process = Process(
        "Prometheus",
        [
            installed("prometheus"),
            f"--config.file={configuration}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={HOST}:{port}",
            "--log.level=warn",
            "--query.lookback-delta=3s",
        ],
        log_path=directory / "prometheus.log",
    )
    server = Prometheus(port)

    def ready() -> bool:
        try:
            server.query("up")
        except OSError:
            return False
        return True

    process.start(ready=ready)
    try:
        yield server
    finally:
        process.stop()
