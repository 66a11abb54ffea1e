"""The admin shows events, channels and the state; its actions have permissions of their own."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from datetime import timedelta
from io import StringIO
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from django.core.management import call_command
from django.db import connection, connections
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from pg_eventstream.operate.events import browse
from pg_eventstream.operate.state import read_state
from tests.support.database import Database
from tests.support.environment import child_environment
from tests.support.logins import Login
from tests.support.roles import granted
from tests.support.rounds import prune, sequence
from tests.support.stored import age

EVENTS = "/admin/pg_eventstream/event/"
STATE = f"{EVENTS}state/"
CHANNELS, SEND, AGAIN = f"{EVENTS}channels/", f"{EVENTS}send/", f"{EVENTS}send-again/"
EVENT = {"channel": "room", "type": "message", "data": '{"n": 1}'}
HOSTILE = "<script>alert('\"&</script>{{ 7|add:1 }}"


def send(database: Database, channel: str, *data: str) -> None:
    for text in data:
        database.send(channel, text)
    sequence(database)


def text_of(client: Client, path: str, **query: Any) -> str:
    response = client.get(path, query)
    assert response.status_code == 200, response.status_code
    return response.content.decode()


def rows(page: str) -> list[str]:
    """The data in the rows of a list."""
    return re.findall(r"<code>(.*?)</code>", page, re.DOTALL)


def link(page: str, name: str) -> str:
    """Where the link with this text leads; empty if there is none."""
    found = re.search(rf'<a href="([^"]*)"[^>]*>{name}</a>', page)
    return found[1].replace("&amp;", "&") if found else ""


# Who may do what

ALLOWED = {
    "view_event": {(EVENTS, "GET"), (CHANNELS, "GET"), (STATE, "GET"), ("event", "GET")},
    "send_event": {(SEND, "GET"), (SEND, "POST")},
    "retry_event": {(AGAIN, "GET"), (AGAIN, "POST")},
    "add_event": set(),
    "change_event": set(),
    "delete_event": set(),
}
REQUESTS = sorted({request for allowed in ALLOWED.values() for request in allowed})


@pytest.mark.parametrize("permission", ALLOWED)
def test_each_page_has_its_permission(database: Database, login: Login, permission: str) -> None:
    send(database, "room", "1")
    client = login(permission)
    event = database.value("SELECT min(id) FROM pg_eventstream_event")
    for path, method in REQUESTS:
        url = f"{EVENTS}{event}/change/" if path == "event" else path
        response = client.post(url, EVENT) if method == "POST" else client.get(url)
        expected = {200, 302} if (path, method) in ALLOWED[permission] else {403}
        assert response.status_code in expected, (path, method)


@pytest.mark.parametrize("staff", [False, None], ids=["not staff", "anonymous"])
def test_others_are_sent_to_the_login(admin: None, login: Login, staff: bool | None) -> None:
    client = Client() if staff is None else login(*ALLOWED, staff=False)
    for path, method in REQUESTS:
        url = f"{EVENTS}1/change/" if path == "event" else path
        response = client.post(url, EVENT) if method == "POST" else client.get(url)
        assert response.status_code == 302
        assert response["Location"].startswith("/admin/login/")


@pytest.mark.parametrize("path", [SEND, AGAIN])
def test_actions_need_a_csrf_token(database: Database, login: Login, path: str) -> None:
    client = login("send_event", "retry_event", checks_csrf=True)
    assert client.post(path, EVENT).status_code == 403
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', text_of(client, path))
    assert token
    assert client.post(path, {**EVENT, "csrfmiddlewaretoken": token[1]}).status_code == 302


def test_nothing_can_be_added_changed_or_deleted(database: Database, login: Login) -> None:
    send(database, "room", "1")
    client = login(*ALLOWED)
    pk = database.value("SELECT min(id) FROM pg_eventstream_event")
    for path in ("add/", f"{pk}/delete/", f"{pk}/history/"):
        assert client.get(f"{EVENTS}{path}").status_code == 404
    for path in (EVENTS, f"{EVENTS}{pk}/change/"):
        client.post(path, {"action": "delete_selected", "_selected_action": pk, "post": "yes"})
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 1
    assert 'href="/admin/pg_eventstream/event/"' in text_of(client, "/admin/")


def test_reading_acts_never(database: Database, login: Login) -> None:
    client = login(*ALLOWED)
    for path in (EVENTS, CHANNELS, STATE, SEND, AGAIN):
        with CaptureQueriesContext(connection) as queries:
            text_of(client, path, **EVENT)
        assert [q["sql"] for q in queries if not q["sql"].lstrip().startswith(("SELECT", "WITH"))
                ] == []  # fmt: skip
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0


# Events


def test_pages_of_events(database: Database, login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browse, "PAGE_EVENTS", 3)
    for n in range(4):
        send(database, "a", f"a{n}")
        send(database, "b", f"b{n}")
    client = login("view_event")
    for query, expected in {
        "": ["b3 a3 b2", "a2 b1 a1", "b0 a0"],
        "?channel=a": ["a3 a2 a1", "a0"],
        "?type=message": ["b3 a3 b2", "a2 b1 a1", "b0 a0"],
        "?type=message&channel=b": ["b3 b2 b1", "b0"],
        "?type=other": [""],
        "?channel=c": [""],
    }.items():
        found, following = [], query
        while True:
            page = text_of(client, EVENTS + following)
            found.append(" ".join(rows(page)))
            following = link(page, "Older")
            if not following:
                break
        assert found == expected, query
        assert (link(page, "Newest") != "") == (len(expected) > 1)


def test_events_of_a_time(database: Database, login: Login) -> None:
    for name, hours in {"a": 5, "b": 3, "c": 1}.items():
        send(database, name, name)
        age(database, events_of=name, by=timedelta(hours=hours))
    client = login("view_event")

    def ago(hours: float) -> str:
        moment = timezone.localtime() - timedelta(hours=hours)
        return f"{moment:%Y-%m-%dT%H:%M:%S}"

    assert rows(text_of(client, EVENTS, since=ago(4))) == ["c", "b"]
    assert rows(text_of(client, EVENTS, until=ago(2))) == ["b", "a"]
    assert rows(text_of(client, EVENTS, since=ago(4), until=ago(2))) == ["b"]
    assert rows(text_of(client, EVENTS, since=ago(0.5))) == []
    assert rows(text_of(client, EVENTS, until=ago(6))) == []
    assert rows(text_of(client, EVENTS, channel="b", since=ago(4), until=ago(2))) == ["b"]
    assert rows(text_of(client, EVENTS, channel="b", since=ago(2))) == []


def test_search_by_type_looks_at_the_newest_events_and_says_so(
    database: Database, login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browse, "SEARCHED", 5)
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, type, data)"
        " SELECT 'a', 'rare', n FROM generate_series(1, 8) AS n"
    )
    sequence(database)
    page = text_of(login("view_event"), EVENTS, type="rare")
    assert rows(page) == [*"87654"]
    assert "Only the newest 5 events were searched for this type." in page


def test_events_that_are_not_in_order_yet_are_shown_first(database: Database, login: Login) -> None:
    send(database, "room", "done")
    database.send("room", "waiting")
    client = login("view_event")
    page = text_of(client, EVENTS)
    assert rows(page) == ["waiting", "done"]
    assert "Not in order yet" in page
    assert rows(text_of(client, EVENTS, channel="other")) == []
    pk = database.value("SELECT max(id) FROM pg_eventstream_event")
    assert "not put in order yet" in text_of(client, f"{EVENTS}{pk}/change/")
    sequence(database)
    assert "Not in order yet" not in text_of(client, EVENTS)


@pytest.mark.parametrize(
    "query",
    ["before=x", f"before={10**30}", "channel=" + "a" * 300, "channel=a%0Ab", "channel=%00",
     "since=yesterday", "type=%FF%00"],
)  # fmt: skip
def test_wrong_filters_are_named(database: Database, login: Login, query: str) -> None:
    send(database, "room", "1")
    page = text_of(login("view_event"), f"{EVENTS}?{query}")
    assert "errorlist" in page or query.startswith("before")
    assert rows(page) == []


def test_page_of_an_event(database: Database, login: Login) -> None:
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids, meta)"
        """ VALUES ('room 1', 'paid', '{"order":7}', '{"x y"}', '{"cause": "test"}')"""
    )
    sequence(database)
    database.execute("INSERT INTO pg_eventstream_proxy VALUES ('http://a', 1), ('http://b', 0)")
    client = login("view_event")
    page = text_of(client, EVENTS)
    page = text_of(client, link(page, "room%201:1"))
    for shown in ("room 1", "paid", "{\n  &quot;order&quot;: 7\n}", "x y",
                  "{&quot;cause&quot;: &quot;test&quot;}"):  # fmt: skip
        assert shown in page
    assert re.findall(r"<th>(http://.)</th><td>(.*?)</td>", page) == [
        ("http://a", "has taken it"),
        ("http://b", "has not taken it yet"),
    ]
    pk = database.value("SELECT max(id) FROM pg_eventstream_event")
    for hint in ("", "?position=7", "?position=x", f"?position={10**30}"):
        assert "room%201:1" in text_of(client, f"{EVENTS}{pk}/change/{hint}")
    for number in (pk + 1, 10**30):
        assert client.get(f"{EVENTS}{number}/change/").status_code == 404


def test_event_that_the_trigger_did_not_see(database: Database, login: Login) -> None:
    with database.connect() as other:
        other.execute("SET session_replication_role = replica")
        other.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', '1')")
    pk = database.value("SELECT max(id) FROM pg_eventstream_event")
    page = text_of(login("view_event"), f"{EVENTS}{pk}/change/")
    assert "the trigger did not see it" in page


def test_nothing_in_an_event_becomes_html(database: Database, login: Login) -> None:
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, type, data, skip_user_ids, meta)"
        " SELECT t, t, t, ARRAY[t], to_jsonb(t) FROM (SELECT %(text)s::text AS t) AS hostile",
        {"text": HOSTILE},
    )
    client = login("view_event")
    sequence(database)
    pk = database.value("SELECT max(id) FROM pg_eventstream_event")
    query = quote(HOSTILE)
    for path in (
        EVENTS, f"{EVENTS}?channel={query}&type={query}&since={query}", CHANNELS,
        f"{CHANNELS}?from={query}", f"{EVENTS}{pk}/change/",
    ):  # fmt: skip
        page = text_of(client, path)
        assert "<script>alert" not in page, path
        assert "alert(" in page, path
    client = login("send_event")
    response = client.post(SEND, {**EVENT, "data": HOSTILE})
    assert "<script>alert" not in response.content.decode()


# Channels


def test_pages_of_channels(
    database: Database, login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browse, "PAGE_CHANNELS", 2)
    send(database, "gone", "1", "2")
    prune()
    for name in ("a", "b c", "d"):
        send(database, name, "1", "2")
    client = login("view_event")
    page = text_of(client, CHANNELS)
    names = re.findall(r'<th><a href="[^"]*">(.*?)</a></th>\s*<td>(.*?)</td>', page)
    assert names == [("a", "a:2"), ("b c", "b%20c:2")]
    page = text_of(client, CHANNELS + link(page, "Next"))
    names = re.findall(r'<th><a href="[^"]*">(.*?)</a></th>\s*<td>(.*?)</td>', page)
    assert names == [("d", "d:2"), ("gone", "gone:2")]
    assert page.count("pruned") == 1
    assert link(page, "Next") == ""
    assert rows(text_of(client, link(page, "d"))) == ["2", "1"]
    assert ">d</a>" in text_of(client, f"{CHANNELS}?from=c")


# State


@override_settings(GRIP_URL="http://<b>.example:5561")
def test_state_is_what_the_command_shows(database: Database, login: Login) -> None:
    database.send("room")
    page = html.unescape(text_of(login("view_event"), STATE))
    out = StringIO()
    with pytest.raises(SystemExit):
        call_command("eventstream_status", stdout=out)
    shown = page[page.index("<pre>") : page.index("</pre>")]
    for line in out.getvalue().splitlines():
        if line.startswith("BROKEN: ") and "proxy" not in line:
            assert line in shown
    assert "BROKEN: no-publisher" in shown
    assert "waiting to be put in order: 1" in shown


def test_state_that_cannot_be_read(database: Database, login: Login) -> None:
    client = login("view_event")
    with pytest.MonkeyPatch.context() as patch:

        def fail() -> None:
            raise psycopg.OperationalError("<b>no route")

        patch.setattr("pg_eventstream.admin.read_state", fail)
        response = client.get(STATE)
    assert response.status_code == 503
    assert "cannot be read: &lt;b&gt;no route" in response.content.decode()


# Actions


def log_entries() -> list[tuple[str, str, str, int]]:
    from django.contrib.admin.models import LogEntry

    return list(
        LogEntry.objects.order_by("id").values_list(
            "user__username", "object_repr", "change_message", "action_flag"
        )
    )


def test_test_event_is_sent_and_logged(database: Database, login: Login) -> None:
    client = login("send_event", "view_event")
    response = client.post(SEND, EVENT, follow=True)
    assert response.redirect_chain == [(EVENTS, 302)]
    sent = database.fetch("SELECT id, channel, type, data FROM pg_eventstream_event")
    assert sent == [(sent[0][0], "room", "message", '{"n": 1}')]
    assert f"{EVENTS}{sent[0][0]}/change/" in response.content.decode()
    assert log_entries() == [("user 0", "message on room", "Sent as a test.", 1)]
    assert client.post(SEND, {**EVENT, "data": "<b>", "is_text": "on"}).status_code == 302
    assert database.value("SELECT data FROM pg_eventstream_event ORDER BY id DESC") == "<b>"
    # The admin's own page links to the event.
    assert f"{EVENTS}{sent[0][0]}/change/" in text_of(client, "/admin/")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "{"}, "This is not JSON"),
        ({"data": ""}, "This field is required"),
        ({"channel": ""}, "This field is required"),
        ({"channel": "a" * 256}, "at most 255 characters"),
        ({"channel": "pg_eventstream:permission"}, "are reserved"),
        ({"channel": "a\nb"}, "must not contain CR, LF or NUL"),
        ({"type": "stream-open"}, "is reserved"),
    ],
)
def test_invalid_test_event_is_refused(
    database: Database, login: Login, changes: dict[str, str], message: str
) -> None:
    response = login("send_event").post(SEND, {**EVENT, **changes})
    assert response.status_code == 200
    assert message in response.content.decode()
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0
    assert log_entries() == []


def test_events_that_the_trigger_did_not_see_are_sent_again(
    database: Database, login: Login
) -> None:
    send(database, "room", "seen")
    with database.connect() as other:
        other.execute("SET session_replication_role = replica")
        other.execute(
            "INSERT INTO pg_eventstream_event (channel, data, meta) VALUES"
            """ ('room', '1', '{"a": 1}'), ('room', '2', NULL)"""
        )
    response = login("retry_event").post(AGAIN, follow=True)
    assert "2 events were sent again." in response.content.decode()
    sequence(database)
    assert database.fetch(
        "SELECT data, meta FROM pg_eventstream_stream JOIN pg_eventstream_event AS e"
        " ON e.id = event_id ORDER BY position"
    ) == [("seen", None), ("1", {"a": 1}), ("2", None)]
    assert log_entries() == [
        ("user 0", "2 events", "Sent again events that the trigger had not seen.", 2)
    ]


def test_action_and_its_log_entry_are_one_transaction(database: Database, login: Login) -> None:
    client = login("send_event", "retry_event")
    database.execute("ALTER TABLE django_admin_log ADD CONSTRAINT no_more CHECK (false)")
    response = client.post(SEND, EVENT)
    assert "The database did not take the event" in response.content.decode()
    response = client.post(AGAIN, follow=True)
    assert "Nothing was sent again" in response.content.decode()
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0


def test_missing_right_is_shown(database: Database, login: Login) -> None:
    client = login("view_event")
    database.execute("DROP TABLE pg_eventstream_outbox")
    response = client.get(EVENTS)
    assert response.status_code == 503
    assert "The events cannot be read: relation &quot;pg_eventstream_outbox" in (
        response.content.decode()
    )


@pytest.mark.usefixtures("admin")
def test_roles_that_the_pages_need(database: Database) -> None:
    from pg_eventstream.admin import _insert

    role = granted(database, "sender", "endpoint", "observer")
    send(database, "room", "1")
    database.send("room", "waiting")
    here = connections["default"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(here.settings_dict, "USER", role)
        here.close()
        page = browse.list_events("default")
        assert [event.data for event in (*page.waiting, *page.events)] == ["waiting", "1"]
        for event in (*page.waiting, *page.events):
            assert browse.get_event("default", event.pk) is not None
        assert len(browse.list_channels("default").channels) == 1
        read_state()
        for meta in (None, '{"a": 1}'):
            assert _insert(("room", "message", "1", [], meta)).pk
        here.close()


# Another database, another site


def test_events_are_in_their_database_and_the_log_in_the_default_one(
    database: Database, login: Login
) -> None:
    client = login("send_event", "view_event")
    other = f"{database.name}_events"
    database.execute(f"CREATE DATABASE {other}")
    connections.settings["events"] = {**connections.settings["default"], "NAME": other}
    try:
        with override_settings(
            EVENTSTREAM_DATABASE="events",
            DATABASE_ROUTERS=["pg_eventstream.router.EventStreamRouter"],
        ):
            call_command("migrate", "pg_eventstream", database="events", verbosity=0)
            response = client.post(SEND, EVENT, follow=True)
            assert rows(response.content.decode()) == ["{&quot;n&quot;: 1}"]
            assert log_entries() == [("user 0", "message on room", "Sent as a test.", 1)]
    finally:
        connections["events"].close()
        del connections["events"], connections.settings["events"]
        database.execute(f"DROP DATABASE {other} WITH (FORCE)")
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0


def test_site_of_a_project(database: Database, login: Login) -> None:
    send(database, "room", "1")
    client = login("view_event", "send_event")
    with override_settings(ROOT_URLCONF="tests.project.admin_site_urls"):
        page = text_of(client, "/operators/pg_eventstream/event/")
        assert "Operators" in page
        links = set(re.findall(r'href="(/[^"?]*event/[^"?]*)', page))
        assert len(links) > 3
        assert all(one.startswith("/operators/") for one in links)
        response = client.post("/operators/pg_eventstream/event/send/", EVENT)
        assert response["Location"] == "/operators/pg_eventstream/event/"


# Cost


@pytest.mark.parametrize(
    ("path", "most"),
    [
        (EVENTS, 3),
        (f"{EVENTS}?channel=a&before=50", 2),
        (f"{EVENTS}?type=rare", 3),
        (f"{EVENTS}?since=2026-01-01T00:00&until=2036-01-01T00:00", 30),
        (CHANNELS, 1),
        (f"{EVENTS}1/change/?position=1", 3),
    ],
)
def test_pages_count_nothing_and_skip_nothing(
    database: Database, login: Login, path: str, most: int
) -> None:
    database.execute(
        "INSERT INTO pg_eventstream_event (channel, data) SELECT 'a', generate_series(1, 150)"
    )
    sequence(database)
    client = login("view_event")
    text_of(client, path)
    with CaptureQueriesContext(connection) as queries:
        text_of(client, path)
    statements = [q["sql"] for q in queries if "pg_eventstream_" in q["sql"]]
    statements = [sql for sql in statements if "auth_permission" not in sql]
    assert 0 < len(statements) <= most
    for sql in statements:
        assert not re.search(r"count\(|\bOFFSET\b", sql, re.IGNORECASE)
        assert "LIMIT" in sql or re.search(r"WHERE (id|position) = \d+|pg_eventstream_proxy", sql)


# Without it


def test_admin_is_not_imported_where_it_is_not_installed() -> None:
    code = (
        "import django; django.setup(); import sys; from django.urls import resolve;"
        " resolve('/events/'); print('django.contrib.admin.sites' in sys.modules,"
        " 'pg_eventstream.admin' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "False False\n", json.dumps(found.stderr)
