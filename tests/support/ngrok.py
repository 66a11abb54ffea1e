"""runserver_ngrok, and a substitute for the services that it calls."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from io import StringIO
from typing import Any
from urllib.parse import parse_qsl

from django.core.management import call_command

from tests.support.http_service import HttpService, body_of, respond


class Service(HttpService):
    """Gives the same response to every request, and records the requests."""

    def __init__(self, status: int = 200, body: str = "") -> None:
        super().__init__()
        self.status, self.body = status, body
        self.requests: list[tuple[str, str]] = []
        self.forms: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append((request.command, request.path))
        self.forms.append(dict(parse_qsl(body_of(request).decode())))
        self.headers.append(dict(request.headers))
        respond(request, self.status, self.body.encode())


def tunnel(url: str, to: str = "http://localhost:8000") -> dict[str, Any]:
    """An entry of ngrok's list of tunnels."""
    return {
        "name": "command_line",
        "public_url": url,
        "proto": url.partition(":")[0],
        "config": {"addr": to, "inspect": True},
    }


def run(ngrok: Service, **options: Any) -> None:
    """Run the command up to the moment when it would serve."""
    call_command(
        "runserver_ngrok", ngrok_api=f"{ngrok.url}/api", use_reloader=False, stdout=StringIO(),
        **options,
    )  # fmt: skip
