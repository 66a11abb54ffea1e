"""A client of the endpoint, for the doctor. It notes what a browser would hide."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import urlsplit, urlunsplit

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from ... import sse

# The most that is kept of a response that is no stream.
_BODY_BYTES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Why there is no response. ``kind`` is the code of the finding."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The head of a response. ``body`` is its beginning, if it is no stream."""

    status: int
    headers: Mapping[str, str]
    body: str = ""

    @property
    def is_stream(self) -> bool:
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return self.status == 200 and kind == sse.MEDIA_TYPE


@dataclass(frozen=True, slots=True)
class Received:
    """An event, and when it arrived, by `time.perf_counter`. A comment has the type ":"."""

    type: str
    data: str
    id: str
    at: float


class Client:
    """Requests a URL once, on a thread, and reads the events of the response as they arrive.

    It follows no redirect and tries nothing again. As a context manager, it closes the connection
    at the end.
    """

    def __init__(self, url: str, headers: Mapping[str, str], *, silence: float) -> None:
        """``silence`` is the number of seconds without a byte after which it gives up."""
        self.trouble: Trouble | None = None
        self.answer: Answer | None = None
        self.received: list[Received] = []
        self.ended = False
        self._url = url
        # As browsers do: what is on the way could compress.
        self._headers = {"Accept": sse.MEDIA_TYPE, "Accept-Encoding": "gzip, deflate", **headers}
        self._silence = silence
        self._closing = False
        self._response: urllib3.BaseHTTPResponse | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pg_eventstream doctor", daemon=True)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._closing = True
        if self._response is not None:
            with suppress(OSError, ValueError, RuntimeError):  # it has ended already
                self._response.shutdown()

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until the condition is true, the response ends, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self.ended or condition(), seconds)
            return condition()

    def find(self, event_type: str, data: str | None = None) -> Received | None:
        """The first event of this type, and with this data if it is given."""
        for event in list(self.received):
            if event.type == event_type and data in (None, event.data):
                return event
        return None

    def _run(self) -> None:
        try:
            self._request()
        except (HTTPError, OSError) as e:
            if self.answer is None:
                self.trouble = _explain(e)
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def _request(self) -> None:
        timeout = urllib3.Timeout(connect=self._silence, read=self._silence)
        with urllib3.PoolManager(retries=False, timeout=timeout) as pool:
            response = pool.request(
                "GET", self._url, headers=self._headers, redirect=False, preload_content=False
            )
            self._response = response
            headers = {name.lower(): value for name, value in response.headers.items()}
            answer = Answer(status=response.status, headers=headers)
            if not answer.is_stream:
                body = response.read(_BODY_BYTES).decode(errors="replace")
                answer = Answer(status=response.status, headers=headers, body=body)
            with self._changed:
                self.answer = answer
                self._changed.notify_all()
            if answer.is_stream:
                self._read(response)

    def _read(self, response: urllib3.BaseHTTPResponse) -> None:
        rest = b""
        while not self._closing and (piece := response.read1()):
            at = time.perf_counter()
            *blocks, rest = (rest + piece).split(b"\n\n")
            if events := [_parse(block.decode(errors="replace"), at) for block in blocks]:
                with self._changed:
                    self.received += events
                    self._changed.notify_all()


def get(url: str, headers: Mapping[str, str], seconds: float) -> Answer | None:
    """The answer to a plain request, or None if there is none in time."""
    with Client(url, headers, silence=seconds) as client:
        client.wait(lambda: client.answer is not None, seconds)
        return client.answer


def with_parameter(url: str, parameter: str) -> str:
    """The URL with one more parameter in its query."""
    parts = urlsplit(url)
    query = "&".join(filter(None, [parts.query, parameter]))
    return urlunsplit(parts._replace(query=query, fragment=""))


def _parse(block: str, at: float) -> Received:
    fields: dict[str, list[str]] = {}
    for line in block.split("\n"):
        name, _, value = line.partition(":")
        fields.setdefault(name, []).append(value.removeprefix(" "))
    if "data" not in fields:
        return Received(":", "\n".join(fields.get("", [])).strip(), "", at)
    event_type = fields.get("event", ["message"])[-1]
    return Received(event_type, "\n".join(fields["data"]), fields.get("id", [""])[-1], at)


def _explain(error: Exception) -> Trouble:
    kind = "connection-lost"
    match error:
        case SSLError():
            kind = "tls-error"
        case NameResolutionError():
            kind = "unknown-host"
        case NewConnectionError():
            kind = "not-reachable"
        case ConnectTimeoutError() | ReadTimeoutError():
            kind = "no-answer"
    return Trouble(kind=kind, message=str(error) or type(error).__name__)
