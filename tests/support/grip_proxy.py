"""A GRIP proxy that works like Pushpin, step by step: its sessions take items, pages and links.

Each step happens when a test calls it: a request to the origin and its response are two steps, and
items can arrive in between. Modelled on Pushpin 1.41 (src/handler/httpsession.cpp,
handlerengine.cpp, sequencer.cpp, filter.cpp). One difference: an item that is out of order reaches
sessions at once, and not after 5 seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from tests.support.origin import Answer, Origin, parse_event
from tests.support.sse_client import Received

Item = dict[str, Any]
#: Items that a session queues during a request to the origin (Pushpin: 100, PUBLISH_QUEUE_MAX).
#: It drops further ones.
QUEUE = 5


class State(Enum):
    OPENING = "has the answer to the client's request"
    ASKED = "has the answer to its next link"
    WAITING = "is about to ask at its next link"
    HELD = "passes on what is published"
    ENDED = "over"


class Client(Protocol):
    """The client of a session."""

    def answered(self, answer: Answer) -> None:
        """Called when the origin has responded, before the client gets the response."""

    def receive(self, event: Received) -> None: ...
    def held(self) -> None: ...


class Proxy:
    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.sessions: list[Session] = []
        #: All items that were published, for a publisher that repeats them.
        self.history: list[Item] = []
        #: Ids of the last minute. An item with one of them is not taken again.
        self.known: set[tuple[str, str]] = set()
        self.last_ids: dict[str, str] = {}
        #: Channels with a first subscriber. A second later, all their sessions ask the origin.
        self.first_subscribed: set[str] = set()

    @property
    def subscribed(self) -> set[str]:
        return {name for session in self.sessions for name in session.channels}

    def open(self, client: Client, channels: list[str], last_event_id: str, cookie: str) -> Session:
        query = urlencode([("channel", channel) for channel in channels], quote_via=quote)
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        answer = self.origin.ask(f"/events/?{query}", {"Cookie": cookie, **headers})
        session = Session(self, client, answer)
        self.sessions.append(session)
        return session

    def close(self, session: Session) -> None:
        self.sessions.remove(session)
        session.state = State.ENDED
        for name in set(self.last_ids) - self.subscribed:
            del self.last_ids[name]

    def publish(self, item: Item) -> None:
        name, item_id = item["channel"], item.get("id")
        if item_id is not None:
            if (name, item_id) in self.known:
                return
            self.known.add((name, item_id))
        self.last_ids.pop(name, None)
        if item_id is not None and name in self.subscribed:
            self.last_ids[name] = item_id
        for session in list(self.sessions):
            session.publish(item)

    def fetch(self) -> None:
        """Send the pending requests of sessions. Sessions with equal requests share a response."""
        answers: dict[tuple[str, str], Answer] = {}
        for session in self.sessions:
            if session.state is State.WAITING:
                question = (session.link.partition("?")[0], session.grip_last)
                if question not in answers:
                    answers[question] = self.origin.ask(session.link, {"Grip-Last": question[1]})
                session.ask(answers[question])

    def go_on(self) -> None:
        """Let sessions process their responses."""
        for session in list(self.sessions):
            if session.state in (State.OPENING, State.ASKED):
                session.go_on()

    def come_to_rest(self) -> None:
        """Complete everything that is in progress."""
        while True:
            self.go_on()
            for session in self.sessions:
                if self.first_subscribed & session.channels.keys():
                    session.update()
            self.first_subscribed.clear()
            if all(session.state is State.HELD for session in self.sessions):
                return
            self.fetch()


class Session:
    """The stream of one client."""

    def __init__(self, proxy: Proxy, client: Client, answer: Answer) -> None:
        self.proxy = proxy
        self.client = client
        self.state = State.OPENING
        #: The last id that was sent, by channel; None if the channel is held without an id.
        self.channels: dict[str, str | None] = {}
        self._filters: dict[str, list[str]] = {}
        self._queue: list[Item] = []
        self._update_again = False
        #: A hint arrived while it could not be taken. The publisher repeats hints.
        self.missed_hint = False
        #: Events can be missing until the next one of their channel, or the next link's timeout.
        self.may_lack = False
        self._take_question(answer)

    @property
    def grip_last(self) -> str:
        ids = [(name, last) for name, last in self.channels.items() if last is not None]
        return ", ".join(f"{name}; last-id={last}" for name, last in ids)

    def ask(self, answer: Answer) -> None:
        self.state = State.ASKED
        self.missed_hint = self.may_lack = False
        self._take_question(answer)

    def _take_question(self, answer: Answer) -> None:
        self._answer = answer
        self.client.answered(answer)

    def update(self) -> None:
        """Request the next link as soon as possible."""
        if self.state is State.HELD:
            self.state = State.WAITING
        elif self.state is State.ASKED:
            self._update_again = True

    def go_on(self) -> None:
        """Forward the origin's response, and follow its instructions."""
        answer, first = self._answer, self.state is State.OPENING
        assert answer.status == 200
        for event in answer.all:
            self.client.receive(event)
        self.link = answer.next_link if "Grip-Link" in answer.response else ""
        if answer.held:
            assert self.link
            self._hold(answer, first)
        elif self.link:
            self.state = State.WAITING
        else:
            self.proxy.close(self)

    def _hold(self, answer: Answer, first: bool) -> None:
        before = self.proxy.subscribed
        self.channels, self._filters = _channels(answer.response["Grip-Channel"])
        self._meta = dict(re.findall(r'(\w+)="([^"]*)"', answer.response["Grip-Set-Meta"]))
        self.proxy.first_subscribed |= self.channels.keys() - before
        self.client.held()
        self.state = State.HELD
        for name, last in self.channels.items() if first else ():
            if last is not None and self.proxy.last_ids.get(name, last) != last:
                del self.proxy.last_ids[name]
                self.state = State.WAITING
        while self._queue and not self._follows(self._queue[0]):
            self.missed_hint |= _is_hint(self._queue.pop(0))
        self._work()
        if self._update_again:
            self._update_again = False
            self.update()

    def publish(self, item: Item) -> None:
        name = item["channel"]
        if name not in self.channels:
            if name in _channels(self._answer.response.headers.get("Grip-Channel", ""))[0]:
                # It has not subscribed yet. If the first response holds it, its ids reveal missing
                # events, except after a hint; if the response is a page, nothing does.
                self.missed_hint |= _is_hint(item)
                self.may_lack |= self.state is not State.OPENING or not self._answer.held
        elif len(self._queue) < QUEUE:
            self._queue.append(item)
            self._work()
        else:
            self.may_lack = True

    def _follows(self, item: Item) -> bool:
        last = self.channels.get(item["channel"])
        return last is None or item.get("prev-id") == last

    def _work(self) -> None:
        while self._queue and self.state is State.HELD:
            item = self._queue.pop(0)
            if self._follows(item):
                self._pass_on(item)
            else:
                last = self.channels[item["channel"]]
                assert item.get("id") != str(int(last or 0) + 1), "no gap, yet a wrong prev-id"
                self.proxy.last_ids.pop(item["channel"], None)
                self._queue.clear()
                self.state = State.WAITING

    def _pass_on(self, item: Item) -> None:
        name, meta, stream = item["channel"], item.get("meta", {}), item["formats"]["http-stream"]
        filters = self._filters[name]
        skipped = "skip-users" in filters and self._meta["user"] in (
            meta.get("skip_users", "").split(",")
        )
        elsewhere = "require-sub" in filters and (
            meta.get("require_sub", name) not in self.channels
        )
        content = stream.get("content", "")
        if "build-id" in filters:
            content = _build_id(content, self._meta["id_format"], self.channels)
        if self.channels[name] is not None:
            self.channels[name] = item["id"]
        if skipped or elsewhere:
            return
        if _is_hint(item):
            self._queue.clear()
            self.state = State.WAITING
        for block in content.split("\n\n"):
            if event := parse_event(block):
                self.client.receive(event)


def _is_hint(item: Item) -> bool:
    return bool(item["formats"]["http-stream"].get("action") == "hint")


def _channels(header: str) -> tuple[dict[str, str | None], dict[str, list[str]]]:
    """Parse Grip-Channel: the channels with their prev-ids, and the filters of each."""
    last_ids: dict[str, str | None] = {}
    filters: dict[str, list[str]] = {}
    for part in filter(None, header.split(", ")):
        name, *params = part.split("; ")
        last_ids[name] = next((p[8:] for p in params if p.startswith("prev-id=")), None)
        filters[name] = [p[7:] for p in params if p.startswith("filter=")]
    return last_ids, filters


def _build_id(content: str, id_format: str, last_ids: Mapping[str, str | None]) -> str:
    """In 1.41, %I stands for the previous id of the item's own channel."""
    names = {"%%": "%", **{f"%({name})s": last or "" for name, last in last_ids.items()}}
    built = re.sub(r"%%|%\([^)]*\)s", lambda match: names[match[0]], id_format)
    return re.sub("%.", lambda match: {"%%": "%", "%I": built}[match[0]], content, flags=re.S)
