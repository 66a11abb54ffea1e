"""A project written for django-eventstream runs with pg_eventstream after the recipe."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

from pg_eventstream.servers.pushpin import Pushpin
from tests.support.browser import Browser, Page
from tests.support.database import Database
from tests.support.django_eventstream import DjangoEventstream
from tests.support.documentation import example
from tests.support.projects import ROOT, Project
from tests.support.sse_client import SSEClient

SOURCE = ROOT / "tests" / "support" / "fixtures" / "django_eventstream_project"


@pytest.fixture
def project(
    database: Database, pushpin: Pushpin, app_port: int, tmp_path: Path
) -> Iterator[Project]:
    """The project, moved only by the commands of the page, and running."""
    directory = tmp_path / "project"
    shutil.copytree(SOURCE, directory)
    old = DjangoEventstream("default")
    old.send("room-tea", {"user": "bob", "text": "from before"}, {"user": "bob", "text": "last"})
    with Project(directory, "project.settings", database, pushpin) as moved:
        moved.run("sh", "-ec", example("docs/moving.md", "grep -rlE").code)
        moved.run("sh", "-ec", example("docs/moving.md", "eventstream_import").code)
        assert "no issues" in moved.manage("check", "--fail-level=WARNING")
        moved.serve(app_port)
        yield moved


class Member:
    """A user with a browser, and a client of the same streams."""

    def __init__(self, name: str, url: str, browser: Browser, room: str | None) -> None:
        self.user = User.objects.create_user(name)
        self.url = url
        session = Client()
        session.force_login(self.user)
        self.cookie = session.cookies["sessionid"].value
        self.page: Page = browser.new_page()
        self.page.add_cookie(url, "sessionid", self.cookie)
        self.room = room

    def post(self, path: str, body: str, status: int = 200) -> None:
        request = urllib.request.Request(
            f"{self.url}{path}", body.encode(), {"Cookie": f"sessionid={self.cookie}"}
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            assert response.status == status

    def get(self, path: str, **headers: str) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", headers={"Cookie": f"sessionid={self.cookie}", **headers}
        )
        return urllib.request.urlopen(request, timeout=20)

    def sees(self, text: str) -> None:
        self.page.wait_for("(text) => document.body.innerText.includes(text)", text)


@pytest.mark.faults
@pytest.mark.thorough
def test_chat_and_clock_run_unchanged_but_for_names(
    database: Database, project: Project, pushpin: Pushpin, browser: Browser
) -> None:
    # A client that was connected before the move reconnects with its id.
    ann, bob, eve = (Member(name, pushpin.url, browser, "tea") for name in ("ann", "bob", "eve"))
    for member in (ann, bob):
        database.execute(
            "INSERT INTO chat_member (room, user_id) VALUES ('tea', %s)", [member.user.pk]
        )
    cookie = {"Cookie": f"sessionid={bob.cookie}"}
    url = f"{pushpin.url}/rooms/tea/events/"
    with SSEClient(url, last_event_id="room-tea:1", headers=cookie) as client:
        assert json.loads(client.wait_count(1)[0].data)["text"] == "last"
        assert client.events[0].eids == {"room-tea": 2}

    # Pages: a sent event shows live, once, and a clock ticks.
    for member in (ann, bob, eve):
        member.page.goto(f"{pushpin.url}/rooms/tea/")
    eve.sees("Permission denied to channels: room-tea")
    project.start("clock")
    for member in (ann, bob):
        member.page.wait_for("document.getElementById('clock').textContent.length > 10")
    ann.page.evaluate("es.addEventListener('message', (event) => { trusted = event.isTrusted; })")
    bob.post("/rooms/tea/messages/", "text=hello%20%3Cb%3E")
    for member in (ann, bob):
        member.sees("bob: hello <b>")
    assert ann.page.evaluate("trusted") is False  # as the page says
    bob.post("/rooms/tea/messages/", "text=not+for+me&skip_me=1")
    bob.post("/rooms/tea/messages/", "text=end&html=1")
    for member in (ann, bob):
        member.sees("bob: end")
    shown = "[...document.querySelectorAll('#messages li')].map((li) => li.textContent)"
    assert ann.page.evaluate(shown) == ["bob: hello <b>", "bob: not for me", "bob: end"]
    assert bob.page.evaluate(shown) == ["bob: hello <b>", "bob: end"]
    assert "forbidden" not in ann.page.evaluate("document.body.innerText")

    # A user who is removed from the room receives no more of it.
    bob.post("/rooms/tea/members/", json.dumps({"remove": "ann"}), status=204)
    ann.sees("Permission denied to channels: room-tea")

    # Plain HTML, the page of the REST framework, and other origins.
    with SSEClient(url, last_event_id="room-tea:4", headers=cookie) as client:
        client.wait_for(lambda: any(event.type == "html" for event in client.events))
        (html,) = (event for event in client.events if event.type == "html")
        assert html.data == "<li>\n  end\n</li>"
    eve.page.goto(f"{pushpin.url}/api/clock/")
    eve.page.wait_for("document.body.innerText.includes('tick')")
    with SSEClient(f"{pushpin.url}/api/any/clock/") as client:
        client.wait_for(lambda: len(client.events) > 3)
        assert {(event.type, event.id) for event in client.events} == {("tick", "")}
    with eve.get("/clock/", Origin="https://chat.example") as response:
        assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert response.headers["Access-Control-Allow-Credentials"] == "true"


def test_project_does_not_know_us() -> None:
    for path in SOURCE.rglob("*.*"):
        if path.suffix in (".py", ".html"):
            assert "pg_eventstream" not in path.read_text()
