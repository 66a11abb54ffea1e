"""A server that sends the responses of a script and records the requests."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from types import TracebackType
from urllib.parse import urlsplit

from tests.support import pages
from tests.support.classic_script import STATIC
from tests.support.http_service import HttpService


@dataclass(frozen=True)
class Answer:
    """A response. Its `parts` are sent one after the other, with `pause` seconds after each.

    With `hold`, the response then stays open.
    """

    parts: Sequence[bytes] = ()
    status: int = 200
    content_type: str = "text/event-stream"
    pause: float = 0
    hold: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: Message
    at: float
    """In seconds, by a monotonic clock."""


def answer(text: str, *, hold: bool = False, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer([text.encode()], hold=hold, headers=headers or {})


class ScriptedServer(HttpService):
    """Answers requests below ``/events`` one by one, and repeats the last answer.

    It also serves the pages of `pages`, and nothing else.
    """

    def __init__(self, *answers: Answer) -> None:
        super().__init__()
        self.answers = list(answers)
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.closing.set()
        super().__exit__(kind, error, traceback)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        with suppress(ConnectionError):  # the client has gone
            self._send(request, self._choose(request))

    def _choose(self, handler: http.server.BaseHTTPRequestHandler) -> Answer:
        path = urlsplit(handler.path).path
        if path.startswith("/pages/"):
            return Answer([pages.html(path.split("/")[2]).encode()], content_type="text/html")
        if path.startswith("/static/"):
            return Answer([(STATIC / path[8:]).read_bytes()], content_type="text/javascript")
        if not path.startswith("/events"):
            return Answer(status=404)
        with self._lock:
            self.requests.append(
                Request(handler.command, handler.path, handler.headers, time.monotonic())
            )
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def _send(self, handler: http.server.BaseHTTPRequestHandler, answer: Answer) -> None:
        handler.send_response(answer.status)
        handler.send_header("Content-Type", answer.content_type)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        for part in answer.parts:
            handler.wfile.write(part)
            self.closing.wait(answer.pause)
        if answer.hold:
            self.closing.wait()
