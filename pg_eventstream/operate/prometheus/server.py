"""The HTTP port of a process: ``/metrics``, ``/live`` and ``/ready``. Needs prometheus-client."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import TCPServer
from typing import Any

from prometheus_client import CollectorRegistry

from .health import Probes
from .metrics import encode

logger = logging.getLogger(__name__)

#: Connections that are served at once, and how long one may take to send its request.
_MOST_CONNECTIONS = 16
_REQUEST_SECONDS = 5.0


@contextmanager
def serving(host: str, port: int, metrics: CollectorRegistry, health: Probes) -> Iterator[int]:
    """Serve during the block, on threads. Yields the port.

    Raises `OSError` if the port is taken or the host has no address.
    """
    server = _Server(host, port, metrics, health)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REQUEST_SECONDS
    server_version, sys_version = "pg_eventstream", ""

    def do_GET(self) -> None:
        self.server.has_read(self.connection)
        match self.path.partition("?")[0]:
            case "/metrics":
                body, content_type = encode(self.server.metrics, self.headers.get("Accept", ""))
                self._answer(200, body, content_type)
            case "/live":
                self._judge(self.server.health.why_not_live())
            case "/ready":
                self._judge(self.server.health.why_not_ready())
            case _:
                self._answer(404, b"There are /metrics, /live and /ready.\n")

    do_HEAD = do_GET

    def _judge(self, reasons: list[str]) -> None:
        text = "".join(f"{reason}\n" for reason in reasons)
        self._answer(503 if reasons else 200, (text or "ok\n").encode())

    def _answer(
        self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("metrics port: %s", format % args, extra={"event": "metrics-request"})


class _Server(HTTPServer):
    """One thread per connection, of which there are few.

    Clients that send no request cannot keep others out: the one that is the longest without a
    request is disconnected.
    """

    request_queue_size = 32

    def __init__(self, host: str, port: int, metrics: CollectorRegistry, health: Probes) -> None:
        self.metrics = metrics
        self.health = health
        self._lock = threading.Lock()
        #: When each connection was accepted that has sent no request yet.
        self._reading: dict[socket.socket, float] = {}
        self._count = 0
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # Not that of HTTPServer, which looks up the host's name, and can wait for that.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def has_read(self, connection: socket.socket) -> None:
        with self._lock:
            self._reading.pop(connection, None)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if self._count >= _MOST_CONNECTIONS:
                if not self._reading:
                    self.shutdown_request(request)
                    return
                oldest = min(self._reading, key=self._reading.__getitem__)
                del self._reading[oldest]
                _disconnect(oldest)
            self._count += 1
            self._reading[request] = time.monotonic()
        threading.Thread(
            target=self._serve, args=(request, client_address), name="metrics request", daemon=True
        ).start()

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError as e:  # the client has gone
            logger.debug("metrics port: %s", e, extra={"event": "metrics-request"})
        except Exception:
            logger.exception(
                "metrics port: unexpected error",
                extra={"event": "unexpected-error", "part": "metrics"},
            )
        finally:
            self.has_read(request)
            self.shutdown_request(request)
            with self._lock:
                self._count -= 1

    def service_actions(self) -> None:
        """Disconnect clients that take too long, every half second."""
        with self._lock:
            now = time.monotonic()
            for connection, since in self._reading.items():
                if now - since > _REQUEST_SECONDS:
                    _disconnect(connection)


def _disconnect(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
