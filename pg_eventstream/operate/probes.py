"""Sends probes on the doctor's channel, as the application sends events, and times their way.

A probe is an event on `channels.DOCTOR`. It takes the way of all events: a transaction, the
publisher, the proxy, whatever is in front of it, and a client that has opened the endpoint's URL.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin

from django.db import DatabaseError, connections, transaction

from .. import doctor, send
from ..channels import DOCTOR
from ..conf import conf, proxy_name
from .client import Answer, Client, Trouble, get, with_parameter

TYPE = "probe"
#: The steady load: events a second, and their number. At 40 a second, a Pushpin that holds events
#: back while they arrive less than 25 ms apart would hardly be noticed.
RATE, COUNT = 80, 200

_LOOK_SECONDS = 0.005
# The publisher records what the proxies have acknowledged every half second (`limits`).
_RECORD_SECONDS = 2.0
# More than proxies usually buffer, in events that are smaller than the publisher's limit.
_PUSHED_EVENTS, _PUSHED_BYTES, _PUSHED_SECONDS = 8, 60_000, 5.0
_SILENCE_SECONDS = 60.0


@dataclass(slots=True, kw_only=True)
class Way:
    """When a probe was at each station, in seconds. None if it was not there in time.

    ``committed`` is how long its transaction took, and the others count from its end.
    """

    committed: float
    sequenced: float | None = None
    #: When all proxies had acknowledged it. It is known only to within half a second.
    published: float | None = None
    received: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """How a steady load arrived. ``p50`` and ``p99`` are seconds from the commit to the client."""

    sent: int
    #: Events a second, as they were sent.
    rate: float
    received: int
    in_order: bool
    p50: float | None
    p99: float | None


@dataclass(slots=True, kw_only=True)
class Measured:
    """What the doctor has measured. None where it did not get that far."""

    url: str
    #: Why there was no response.
    trouble: Trouble | None = None
    answer: Answer | None = None
    #: Seconds until the stream was open.
    opened: float | None = None
    #: What the endpoint says of itself: see `doctor.describe`.
    description: dict[str, Any] | None = None
    #: The data of a ``stream-error``.
    error: dict[str, Any] | None = None
    #: The clocks of the database, of the application and of the server at the URL, minus ours.
    clocks: dict[str, float] = field(default_factory=dict)
    #: Identifies the table that this process sends to.
    table: str | None = None
    #: Why a probe could not be sent.
    refused: DatabaseError | None = None
    probe: Way | None = None
    #: Whether more data pushed out what was held back on the way.
    was_held_back: bool = False
    #: Seconds until the stream was continued by its next link. None also without a proxy.
    continued: float | None = None
    #: Whether it should have been continued and was not.
    has_stopped: bool = False
    #: The answer to our own request for the next link, if the stream was not continued.
    link: Answer | None = None
    steady: Steady | None = None
    #: The events after a resume, of which there must be two: a missed one and a new one.
    resumed: list[str] | None = None
    #: Whether the connection was closed early.
    was_closed: bool = False

    @property
    def has_resumed(self) -> bool:
        return self.resumed == ["missed", "new"]

    @property
    def reads_another_table(self) -> bool:
        """Whether the application reads another table than the one that probes are sent to."""
        theirs = (self.description or {}).get("table")
        return theirs is not None and theirs != self.table

    @property
    def unverified(self) -> tuple[str, str, str] | None:
        """Why the application does not accept the signature of the proxy: code, reason, remedy."""
        match (self.description or {}).get("unverified"):
            case [str() as code, str() as reason, str() as remedy]:
                return code, reason, remedy
        return None

    @property
    def shows_why_it_stopped(self) -> bool:
        """Whether something else than the endpoint answers our own request for the next link."""
        return self.link is not None and (self.link.status == 404 or 300 <= self.link.status < 400)

    @property
    def is_unpublished(self) -> bool:
        """Whether a probe was put in order, but not taken by all proxies."""
        way = self.probe
        return way is not None and way.sequenced is not None and way.published is None

    @property
    def is_proxied(self) -> bool:
        return bool(self.description and self.description.get("proxied"))


class Prober:
    """Opens a stream at a URL and sends probes, until something does not work.

    ``say`` is called with a line of text after each step.
    """

    def __init__(
        self,
        url: str,
        alias: str,
        *,
        headers: Mapping[str, str],
        timeout: float,
        say: Callable[[str], None],
    ) -> None:
        self._url, self._alias, self._headers = url, alias, dict(headers)
        self._timeout, self._say = timeout, say
        self._name = secrets.token_hex(8)
        self._proxies = [proxy_name(config) for config in conf.grip_proxies]
        self._last_eid = 0
        self.measured = Measured(url=url)

    def run(self) -> Measured:
        """Do all steps. Raises `django.db.DatabaseError` if the database cannot be read."""
        measured = self.measured
        self._look_around()
        with ExitStack() as stack:
            client = stack.enter_context(self._request())
            try:
                # The next link comes first: it would also deliver a probe that is not published.
                works = self._open(client) and self._continue(client) and self._send_one(client)
                if works:
                    self._send_many(client)
                measured.was_closed = client.ended
                if works:
                    client.close()
                    self._resume(client, stack)
            except _NotSent as e:
                measured.refused = e.error
        return measured

    def _look_around(self) -> None:
        before = time.time()
        with connections[self._alias].cursor() as cursor:
            cursor.execute("SELECT extract(epoch FROM clock_timestamp())::float8")
            self.measured.clocks["database"] = cursor.fetchone()[0] - (before + time.time()) / 2
            cursor.execute(
                "SELECT coalesce(max(eid), 0) FROM pg_eventstream_stream WHERE channel = %s",
                [DOCTOR],
            )
            self._last_eid = cursor.fetchone()[0]
        self.measured.table = doctor.identify_table(self._alias)

    def _request(self, last_event_id: str = "") -> Client:
        url = with_parameter(self._url, f"{doctor.PARAMETER}={doctor.make_token()}")
        headers = {**self._headers, **({"Last-Event-ID": last_event_id} if last_event_id else {})}
        return Client(url, headers, silence=max(_SILENCE_SECONDS, 2 * self._timeout))

    def _open(self, client: Client) -> bool:
        self._read_opening(client, time.perf_counter())
        measured = self.measured
        how = "behind a proxy" if measured.is_proxied else "by the application itself"
        if measured.opened is not None:
            self._say(f"opened       {_text(measured.opened)}, {how}")
            if measured.reads_another_table:
                self._say("             from another database than this one")
            return not (measured.reads_another_table or measured.unverified)
        status = "no answer" if measured.answer is None else f"status {measured.answer.status}"
        self._say(f"opened       not ({status})")
        return False

    def _read_opening(self, client: Client, began: float) -> None:
        measured = self.measured

        def is_answered() -> bool:
            return client.answer is not None

        def is_open() -> bool:
            return bool(client.find("stream-open") or client.find("stream-error"))

        for condition in (is_answered, is_open):
            if not client.wait(condition, self._timeout) and not client.ended:
                measured.was_held_back = measured.was_held_back or self._push(condition, client)
            if not condition():
                break
            measured.answer = client.answer
            if client.answer is not None and not client.answer.is_stream:
                break
        if (answer := client.answer) is None:
            measured.trouble = client.trouble or Trouble(
                kind="no-answer", message=f"no response within {self._timeout:g} seconds"
            )
            return
        measured.answer = answer
        description, error = client.find(doctor.DESCRIPTION), client.find("stream-error")
        measured.description = _parse(description.data if description else answer.body)
        measured.error = _parse(error.data) if error else None
        if not measured.was_held_back:
            self._compare_clocks(answer)
            if is_open() and error is None and measured.description is not None:
                measured.opened = time.perf_counter() - began

    def _compare_clocks(self, answer: Answer) -> None:
        clocks = self.measured.clocks
        with suppress(ValueError):
            clocks["server"] = (
                parsedate_to_datetime(answer.headers.get("date", "")).timestamp() - time.time()
            )
        told = (self.measured.description or {}).get("time")
        if isinstance(told, float):
            clocks["application"] = told - time.time()

    def _send_one(self, client: Client) -> bool:
        data = f"{self._name} one"
        self.measured.probe = way = Way(committed=self._send(data))
        self._say(f"committed    {_text(way.committed)}")
        sent = time.perf_counter()

        def follow(until: float) -> None:
            while time.perf_counter() < until:
                self._look(way, data, sent)
                if way.received is None and (event := client.find(TYPE, data)):
                    way.received = max(0.0, event.at - sent)
                is_published = way.published is not None or not self._expects_proxies
                if way.sequenced is not None and is_published and way.received is not None:
                    break
                if way.received is not None:
                    until = min(until, sent + way.received + _RECORD_SECONDS)
                time.sleep(_LOOK_SECONDS)

        follow(sent + self._timeout)
        if way.received is not None and way.published is not None:
            way.published = min(way.published, way.received)  # it is recorded later
        stations = ["sequenced", *(["published"] if self._expects_proxies else []), "received"]
        for station in stations:
            seconds = getattr(way, station)
            shown = "not" if seconds is None else f"{_text(seconds)} after the commit"
            self._say(f"{station:<13}{shown}")
        if way.received is None and not client.ended:
            self.measured.was_held_back = self._push(
                lambda: client.find(TYPE, data) is not None, client
            )
        return way.received is not None

    @property
    def _expects_proxies(self) -> bool:
        return self.measured.is_proxied and bool(self._proxies)

    def _look(self, way: Way, data: str, sent: float) -> None:
        """Look how far the probe is."""
        if way.sequenced is not None and (way.published is not None or not self._expects_proxies):
            return
        with connections[self._alias].cursor() as cursor:
            cursor.execute(
                """
                SELECT (SELECT count(*) FROM pg_eventstream_proxy AS p
                         WHERE p.name = ANY(%s) AND p.position >= s.position)
                  FROM pg_eventstream_stream AS s
                  JOIN pg_eventstream_event AS e ON e.id = s.event_id
                 WHERE s.channel = %s AND s.eid > %s AND e.data = %s
                """,
                [self._proxies, DOCTOR, self._last_eid, data],
            )
            row = cursor.fetchone()
        now = time.perf_counter() - sent
        if row is not None and way.sequenced is None:
            way.sequenced = now
        if row is not None and row[0] == len(self._proxies) and way.published is None:
            way.published = now

    def _continue(self, client: Client) -> bool:
        """Wait until the proxy has asked at the stream's next link, which it does soon."""
        if not self.measured.is_proxied:
            return True
        began = time.perf_counter()
        comment = doctor.CONTINUED.strip(": \n")

        def is_continued() -> bool:
            return client.find(":", comment) is not None

        if client.wait(is_continued, self._timeout):
            self.measured.continued = time.perf_counter() - began
            self._say("continued    by its next link")
            return True
        self._say("continued    not")
        self.measured.has_stopped = True
        link = str((self.measured.description or {}).get("next_link") or "")
        if re.match("/[^/]", link):
            # Without the headers of the client, as the proxy asks.
            self.measured.link = get(urljoin(self._url, link), {}, self._timeout)
        if not client.ended and not self.measured.shows_why_it_stopped:
            self.measured.was_held_back = self._push(is_continued, client)
        return False

    def _send_many(self, client: Client) -> None:
        """Send at a steady rate."""
        began = time.perf_counter()
        sent: dict[str, float] = {}
        for n in range(COUNT):
            time.sleep(max(0.0, began + n / RATE - time.perf_counter()))
            data = f"{self._name} {n}"
            self._send(data)
            sent[data] = time.perf_counter()
        rate = (COUNT - 1) / (max(sent.values()) - min(sent.values()))

        def arrived() -> list[tuple[str, float]]:
            found = [(e.data, e.at) for e in list(client.received) if e.type == TYPE]
            return [(data, at) for data, at in found if data in sent]

        client.wait(lambda: len(arrived()) >= COUNT, self._timeout)
        got = arrived()
        delays = sorted(max(0.0, at - sent[data]) for data, at in got)
        names = [data for data, _ in got]
        self.measured.steady = steady = Steady(
            sent=COUNT,
            rate=rate,
            received=len(set(names)),
            in_order=names == [data for data in sent if data in set(names)],
            p50=delays[len(delays) // 2] if delays else None,
            p99=delays[len(delays) * 99 // 100] if delays else None,
        )
        order = "in order" if steady.in_order else "NOT in order"
        self._say(
            f"{steady.rate:.0f} a second  {steady.received} of {COUNT} {order},"
            f" p50 {_text(steady.p50)}, p99 {_text(steady.p99)}"
        )

    def _resume(self, before: Client, stack: ExitStack) -> None:
        """Come back with the last id. What was missed must arrive, once, and what is new after."""
        missed, new = f"{self._name} missed", f"{self._name} new"
        last = next((event.id for event in reversed(before.received) if event.id), "")
        self._send(missed)
        deadline = time.perf_counter() + self._timeout
        way = Way(committed=0)
        # Without a proxy, an event may be put in order only when a stream is open.
        while self.measured.is_proxied and way.sequenced is None and time.perf_counter() < deadline:
            self._look(way, missed, 0)
            time.sleep(_LOOK_SECONDS)
        client = stack.enter_context(self._request(last))
        client.wait(lambda: client.find(TYPE, missed) is not None, self._timeout)
        client.wait(lambda: client.find("stream-open") is not None, self._timeout)
        self._send(new)
        client.wait(lambda: client.find(TYPE, new) is not None, self._timeout)
        ours = [e.data for e in client.received if e.type == TYPE and e.data.startswith(self._name)]
        self.measured.resumed = [data.removeprefix(f"{self._name} ") for data in ours]
        is_right = ours == [missed, new]
        self._say(f"resumed      {'with the missed event' if is_right else 'wrongly'}")

    def _push(self, condition: Callable[[], bool], client: Client) -> bool:
        """Send much data. True if the condition became true by that."""
        for _ in range(_PUSHED_EVENTS):
            self._send(secrets.token_hex(_PUSHED_BYTES // 2))
        return client.wait(condition, min(self._timeout, _PUSHED_SECONDS))

    def _send(self, data: str) -> float:
        """Send a probe in its own transaction. Returns the seconds that it took."""
        began = time.perf_counter()
        try:
            with transaction.atomic(using=self._alias):
                send.insert((DOCTOR, TYPE, data, [], None), self._alias)
        except DatabaseError as e:
            raise _NotSent(e) from e
        return time.perf_counter() - began


class _NotSent(Exception):
    """A probe could not be sent."""

    def __init__(self, error: DatabaseError) -> None:
        self.error = error


def _parse(text: str) -> dict[str, Any] | None:
    """The object that this text is in JSON; None if it is something else."""
    with suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    return None


def _text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f} s"
