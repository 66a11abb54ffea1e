"""Sends probes on the doctor's channel, as the application sends events, and times their way.

A probe is an event on `channels.DOCTOR`. It takes the way of all events: a transaction, the
publisher, the proxy, whatever is in front of it, and a client that has opened the endpoint's URL.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin

from django.db import DatabaseError, connections, transaction

from ... import doctor, send
from ...channels import DOCTOR
from ...conf import conf, proxy_name
from .client import Answer, Client, Received, Trouble, get, with_parameter
from .measured import Measured, Steady, Way

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
_TRIES = 3
_CONTINUED = doctor.CONTINUED.strip(": \n")


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
        for n in range(_TRIES):
            data = f"{self._name} single {n}"
            links = _count_links(client.received)
            self.measured.probe = way = self._follow(client, data)
            if way.received is None:
                break
            got = list(client.received)
            if _count_links(got[: [event.data for event in got].index(data)]) == links:
                break
            # The proxy has just asked how to continue, and so got the probe without publishing it.
        self._say(f"committed    {_text(way.committed)}")
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

    def _follow(self, client: Client, data: str) -> Way:
        """Send a probe and follow it until it is received, or the time is over."""
        way = Way(committed=self._send(data))
        sent = time.perf_counter()
        until = sent + self._timeout
        while time.perf_counter() < until:
            self._look(way, data, sent)
            if way.received is None and (event := client.find(TYPE, data)):
                way.received = max(0.0, event.at - sent)
                until = min(until, time.perf_counter() + _RECORD_SECONDS)
            is_published = way.published is not None or not self._expects_proxies
            if way.sequenced is not None and is_published and way.received is not None:
                break
            time.sleep(_LOOK_SECONDS)
        if way.received is not None and way.published is not None:
            way.published = min(way.published, way.received)  # it is recorded later
        return way

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

        def is_continued() -> bool:
            return client.find(":", _CONTINUED) is not None

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


def _count_links(events: Iterable[Received]) -> int:
    """How often the stream was continued by its next link."""
    return sum(event.type == ":" and event.data == _CONTINUED for event in events)


def _parse(text: str) -> dict[str, Any] | None:
    """The object that this text is in JSON; None if it is something else."""
    with suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    return None


def _text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f} s"
