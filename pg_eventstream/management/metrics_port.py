"""The options ``--metrics-port`` and ``--metrics-host``, and what serves there."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from django.core.exceptions import ImproperlyConfigured

from ..postgres.connector import Connector

if TYPE_CHECKING:
    from ..operate.prometheus.health import Probes
    from ..operate.prometheus.latest import Latest
    from ..operate.state import State

logger = logging.getLogger("pg_eventstream.metrics")

#: Where the processes of prometheus-client's multiprocess mode keep their numbers.
_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
#: The same, if this package has made it.
_OWN_DIRECTORY = "PG_EVENTSTREAM_METRICS_DIR"


def add_metrics_arguments(parser: ArgumentParser) -> None:
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


@contextmanager
def serving_metrics(
    host: str, port: int, connector: Connector, make_probes: Callable[[Latest[State]], Probes]
) -> Iterator[None]:
    """Serve during the block, on threads. Raises `ImproperlyConfigured` if that is not possible."""
    require_prometheus_client()
    from ..operate.prometheus.metrics import latest_state, registry
    from ..operate.prometheus.server import serving

    state = latest_state(connector)
    with ExitStack() as stack:
        try:
            stack.enter_context(
                serving(host, port, registry(state, with_counters=True), make_probes(state))
            )
        except (OSError, OverflowError) as e:
            raise ImproperlyConfigured(
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


def require_prometheus_client() -> None:
    try:
        import prometheus_client  # noqa: F401
    except ImportError as e:
        raise ImproperlyConfigured(
            "--metrics-port needs prometheus-client. Install it with: pip install"
            " 'pg-eventstream[metrics]'"
        ) from e


@contextmanager
def counting_in_all_processes() -> Iterator[None]:
    """Let the processes that are started in the block count together, in a directory.

    prometheus-client reads where that is when it is imported, which it is already. So this program
    starts anew with a directory for itself, in the same process, unless it has one.
    """
    if _DIRECTORY not in os.environ:
        directory = tempfile.mkdtemp(prefix="pg-eventstream-metrics-")
        environment = {**os.environ, _DIRECTORY: directory, _OWN_DIRECTORY: directory}
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606
    try:
        yield
    finally:
        if _OWN_DIRECTORY in os.environ:
            shutil.rmtree(os.environ[_OWN_DIRECTORY], ignore_errors=True)
