"""A GRIP proxy that consists only of the control port."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

from tests.support.http_service import HttpService, body_of, respond


class ControlPort(HttpService):
    """A control port that misbehaves on demand and records what it accepted."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[int] = []
        """The status codes for the next requests; after these, 200."""
        self.refused = "\0"
        """A request with this text is refused with 400, as Pushpin does."""
        self.takes_all = False
        """Whether it accepts requests that it reports as refused."""
        self.silent = threading.Event()
        """While set, requests get no response."""
        self.answering = threading.Event()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = body_of(request)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.silent.is_set():
            self.answering.wait(60)
        status = self.answers.pop(0) if self.answers else 200
        if status == 200 and self.refused.encode() in body:
            status = 400
        if status == 200 or self.takes_all:
            self.take(body)
        respond(request, status, b"Published" if status == 200 else b"no")

    def take(self, body: bytes) -> None:
        self.items += json.loads(body)["items"]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.answering.set()
        super().__exit__(kind, error, traceback)

    @property
    def ids(self) -> list[str | None]:
        return [item.get("id") for item in self.items]
