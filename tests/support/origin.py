"""The application as a proxy sees it: signed requests, without a proxy in between."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

import jwt
from django.contrib.auth.models import User
from django.http import HttpResponse
from django.test import Client, override_settings

from pg_eventstream import sse
from tests.support.environment import KEY
from tests.support.sse_client import Received

behind_a_proxy = override_settings(GRIP_URL=f"http://127.0.0.1:1?key={KEY}")


def signature(key: str = KEY, lifetime: float = 60) -> str:
    """The Grip-Sig that a proxy with this key sends."""
    return jwt.encode({"iss": "pushpin", "exp": int(time.time() + lifetime)}, key)


class Origin(Client):
    """Django's test client as the proxy. An exception in a view is raised in the test."""

    def open(
        self, *channels: str, path: str = "/events/", last_event_id: str = "", **query: Any
    ) -> Answer:
        """A client's request for a stream, as the proxy forwards it."""
        pairs = [("channel", channel) for channel in channels]
        for name, values in query.items():
            pairs += [(name, value) for value in values]
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        return self.ask(f"{path}?{urlencode(pairs, quote_via=quote)}", headers)

    def follow(self, answer: Answer) -> Answer:
        """The proxy's own request to the next link, if nothing was published in the meantime."""
        channels = answer.response["Grip-Channel"] if answer.held else ""
        held = re.findall(r"([^ ,;]+); prev-id=(\d+)", channels)
        last = ", ".join(f"{name}; last-id={eid}" for name, eid in held)
        return self.ask(answer.next_link, {"Grip-Last": last})

    def ask(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        response = self.get(path, headers={"Grip-Sig": signature(), **(headers or {})})
        return Answer(response)


class Answer:
    """A parsed response of the endpoint."""

    def __init__(self, response: Any) -> None:
        self.response: HttpResponse = response
        self.status: int = response.status_code
        self.body: str = response.content.decode()
        self.held = response.headers.get("Grip-Hold") == "stream"
        text = self.body
        if "Grip-Channel" in response.headers:  # as the proxy's filter changes it
            assert "%" not in text.replace("%%", ""), text
            text = text.replace("%%", "%")
        is_stream = response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        events = [parse_event(block) for block in text.split("\n\n")] if is_stream else []
        self.all = [event for event in events if event is not None]
        self.events = [event for event in self.all if not event.type.startswith("stream-")]
        self.control = {event.type: event for event in self.all if event not in self.events}

    @property
    def next_link(self) -> str:
        found = re.match(r"<([^<>]*)>; rel=next", self.response["Grip-Link"])
        assert found, self.response["Grip-Link"]
        return found[1]

    @property
    def opened_at(self) -> dict[str, int]:
        return sse.parse_id(self.control["stream-open"].id)

    @property
    def data(self) -> list[str]:
        return [event.data for event in self.events]


def parse_event(block: str) -> Received | None:
    fields: dict[str, list[str]] = {}
    for line in block.split("\n"):
        name, _, value = line.partition(":")
        fields.setdefault(name, []).append(value.removeprefix(" "))
    if "data" not in fields:
        return None  # padding
    return Received(fields["event"][0], "\n".join(fields["data"]), fields.get("id", [""])[0], 0)


def log_in(name: str, **attributes: Any) -> tuple[User, str]:
    """Create a user. Returns it and the Cookie header of its session."""
    user = User.objects.create_user(name, **attributes)
    browser = Client()
    browser.force_login(user)
    return user, f"sessionid={browser.cookies['sessionid'].value}"
