"""The admin shows consumers and operates them, with permissions of its own."""

from __future__ import annotations

import html
import re
from typing import Any

import psycopg
import pytest
from django.contrib.auth.models import User
from django.test import Client, override_settings

from pg_eventstream import send_event, send_events
from pg_eventstream.consumers import Consumer, Retry, consumer, declare
from pg_eventstream.errors import ConsumerStopped
from tests.support.consumers import Handled, handle_all
from tests.support.database import Database
from tests.support.handlers import named, obey
from tests.support.logins import Login

LIST = "/admin/pg_eventstream/consumer/"
HOSTILE = "<script>alert('\"&</script>{{ 7|add:1 }}"


@pytest.fixture
def stock(database: Database) -> Consumer:
    """A consumer with one parked event."""
    Handled(database)
    made = make()
    send_events([("orders", "placed", {"fail": "no product"}), ("orders", "placed", 2)])
    handle_all(made)
    return made


def make(name: str = "stock", **options: Any) -> Consumer:
    return consumer(name, **{"start": "earliest", "retry": Retry(1), **options})(named(obey, name))


def url(database: Database, action: str, name: str = "stock") -> str:
    pk = database.value("SELECT id FROM pg_eventstream_consumer WHERE name = %s", [name])
    return f"{LIST}{pk}/{action}/"


def text_of(client: Client, path: str) -> str:
    response = client.get(path)
    assert response.status_code == 200, response.status_code
    return html.unescape(response.content.decode())


def operate(client: Client, database: Database, operation: str, **fields: str) -> str:
    """The message after an operation."""
    path = url(database, "operate")
    response = client.post(path, {"operation": operation, **fields}, follow=True)
    assert response.status_code == 200
    found = re.findall(r'<li class="(?:success|error)">(.*?)</li>', response.content.decode())
    assert len(found) == 1
    return html.unescape(found[0])


PERMISSIONS = {
    "pause": "operate_consumer",
    "resume": "operate_consumer",
    "reset": "operate_consumer",
    "remove": "operate_consumer",
    "retry": "retry_parked",
    "skip": "retry_parked",
    "skip-selected": "retry_parked",
    "rename": "",
    "": "",
}


def test_each_page_and_operation_has_its_permission(
    database: Database, stock: Consumer, login: Login
) -> None:
    names = ["view_consumer", "view_parked", "operate_consumer", "retry_parked", "delete_consumer"]
    for permission in names:
        client = login(permission)
        may_view = permission == "view_consumer"
        for path in (LIST, url(database, "change")):
            assert client.get(path).status_code == (200 if may_view else 403), permission
        assert client.get(url(database, "operate")).status_code == 405
        for operation, needed in PERMISSIONS.items():
            response = client.post(
                url(database, "operate"), {"operation": operation, "id": "9", "to": "x"}
            )
            assert response.status_code == (302 if permission == needed else 403), operation
    for client in (Client(), login(*names, staff=False)):
        for path in (LIST, url(database, "change"), url(database, "operate")):
            assert client.get(path).status_code == 302
    csrf = login(*names, checks_csrf=True)
    assert csrf.post(url(database, "operate"), {"operation": "pause"}).status_code == 403
    for path in ("add/", "1/delete/", "1/history/", "999/change/", f"{10**30}/change/"):
        assert login(*names).get(LIST + path).status_code == 404, path


def test_pages_show_what_the_command_shows(
    database: Database, stock: Consumer, login: Login
) -> None:
    make("never")
    stops = make("stops", on_failure="stop")
    with pytest.raises(ConsumerStopped):
        handle_all(stops)
    handle_all(make("gone", channels=["other"]))
    del declare._declared["gone"]
    client = login("view_consumer", "view_parked", "operate_consumer", "retry_parked")
    page = text_of(client, LIST)
    for shown in ("not running, nothing behind", "1 parked event", "never</th>", "has never run",
                  "orphaned, not running, nothing behind",
                  "has stopped at orders:1 after 1 attempt"):  # fmt: skip
        assert shown in page
    page = text_of(client, url(database, "change"))
    for shown in ("obey.stock", "all channels", "orders:1", "ValueError: no product", "Traceback"):
        assert shown in page
    assert "Skip" in text_of(client, url(database, "change", "stops"))
    page = text_of(login("view_consumer"), url(database, "change"))
    assert "ValueError: no product" not in page
    assert "<button" not in page.split('id="content-main"')[1]
    assert 'href="/admin/pg_eventstream/consumer/"' in text_of(client, "/admin/")


def test_operations_are_done_and_logged(database: Database, stock: Consumer, login: Login) -> None:
    from django.contrib.admin.models import LogEntry

    client = login("view_consumer", "operate_consumer", "retry_parked")
    assert operate(client, database, "pause") == "Consumer stock: Paused."
    assert operate(client, database, "pause") == "Consumer stock: It was paused already."
    assert operate(client, database, "resume") == "Consumer stock: Resumed."
    assert operate(client, database, "retry", id="orders:1").endswith("tried again: 1.")
    assert operate(client, database, "retry", all="1").endswith("tried again: 1.")
    assert operate(client, database, "skip", id="orders:1") == "Consumer stock: Skipped orders:1."
    text = operate(client, database, "reset", to="earliest")
    assert text.startswith(
        "Consumer stock: Reset: it continues after position 0. Events up to position 2"
    )
    done = list(LogEntry.objects.order_by("id").values_list("object_repr", "change_message"))
    assert [message.split(".")[0] for _, message in done] == [
        "Paused", "It was paused already", "Resumed",
        "Parked events that will be tried again: 1", "Parked events that will be tried again: 1",
        "Skipped orders:1", "Reset: it continues after position 0"]  # fmt: skip
    # What is refused is said, and neither done nor logged.
    for operation, fields, message in (
        ("skip", {"id": "orders:7"}, "does not fail at 'orders:7'"),
        ("retry", {"id": "x"}, "has not parked 'x'"),
        ("reset", {"to": "nowhere"}, "'nowhere' is no place in the stream"),
        ("reset", {"to": "77"}, "Position 77 is not reached yet"),
        ("remove", {"confirm": "stocks"}, "To confirm, type the name of the consumer: stock"),
    ):
        assert message in operate(client, database, operation, **fields)
    assert LogEntry.objects.count() == len(done)
    assert operate(client, database, "remove", confirm="stock") == (
        "Consumer stock: Removed all that was stored about stock."
    )
    assert database.value("SELECT count(*) FROM pg_eventstream_consumer") == 0


def test_operation_and_its_log_entry_are_undone_together(
    database: Database, stock: Consumer, login: Login
) -> None:
    @stock.before_reset
    def fail() -> None:
        raise ValueError("<b>not today")

    client = login("view_consumer", "operate_consumer")
    assert "ValueError: <b>not today" in operate(client, database, "reset", to="earliest")
    database.execute("DROP TABLE django_admin_log")
    response = client.post(url(database, "operate"), {"operation": "pause"})
    assert response.status_code == 503
    assert not database.value("SELECT paused FROM pg_eventstream_consumer")


def test_nothing_of_an_event_or_a_consumer_becomes_html(database: Database, login: Login) -> None:
    Handled(database)
    hostile = make(HOSTILE)
    send_event("a", "placed", {"fail": HOSTILE})
    database.execute("UPDATE pg_eventstream_event SET type = %s", [HOSTILE])
    handle_all(hostile)
    client = login("view_consumer", "view_parked", "operate_consumer", "retry_parked")
    for path in (LIST, url(database, "change", HOSTILE)):
        page = client.get(path).content.decode()
        assert "<script>alert" not in page
        assert "alert(" in page


def test_missing_tables_and_rights_are_said(database: Database, login: Login) -> None:
    client = login("view_consumer", "operate_consumer")
    database.execute("ALTER TABLE pg_eventstream_consumer RENAME TO elsewhere")
    response = client.get(LIST)
    assert response.status_code == 503
    assert "The consumers cannot be read: " in response.content.decode()


def test_events_are_in_another_database(database: Database, stock: Consumer, login: Login) -> None:
    """The users, the sessions and the log are in the default one."""
    from django.db import connections

    connections.settings["events"] = connections.settings["default"]
    try:
        with override_settings(EVENTSTREAM_DATABASE="events"):
            client = login("view_consumer", "operate_consumer")
            assert operate(client, database, "pause") == "Consumer stock: Paused."
            assert "paused" in text_of(client, LIST)
    finally:
        connections["events"].close()
        del connections["events"]
        del connections.settings["events"]
    assert User.objects.count() == 1


@pytest.fixture
def many(database: Database, stock: Consumer) -> Consumer:
    """A consumer with 250 parked events, some of them large."""
    database.execute(
        "INSERT INTO pg_eventstream_parked (consumer_id, slot, position, channel, number, type,"
        " data, created, error, traceback, attempts) SELECT consumer_id, slot, n, channel, n,"
        " type, repeat('x', 100 * n), created, error, traceback, attempts"
        "  FROM pg_eventstream_parked, generate_series(2, 250) AS n"
    )
    return stock


def shown(page: str) -> list[str]:
    return re.findall(r"<th>(orders:\d+)</th>", page)


def names(first: int, last: int) -> list[str]:
    return [f"orders:{n}" for n in range(first, last + 1)]


PAGES = {
    "": (1, 100),
    "?p=2": (101, 200),
    "?p=3": (201, 250),
    "?p=-1": (201, 250),  # as Django's paginator does
    "?p=x": (1, 100),
}


def test_all_parked_events_are_on_pages(database: Database, many: Consumer, login: Login) -> None:
    client = login("view_consumer", "view_parked", "retry_parked")
    for query, (first, last) in PAGES.items():
        page = client.get(url(database, "change") + query).content.decode()
        assert shown(page) == names(first, last), query
        assert "250 parked events" in page
        assert len(page) < 1_000_000
    few = text_of(login("view_consumer", "view_parked"), url(database, "change"))
    assert len(shown(few)) == 100
    assert 'type="checkbox"' not in few
    assert "selected again" not in few


def test_page_needs_as_many_statements_for_many_as_for_one(
    database: Database, stock: Consumer, login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    execute = psycopg.Cursor.execute

    def counted(self: psycopg.Cursor[Any], *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return execute(self, *args, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", counted)
    client = login("view_consumer", "view_parked", "retry_parked")
    found = []
    for parked in (1, 100):
        if parked > 1:
            database.execute(
                "INSERT INTO pg_eventstream_parked (consumer_id, slot, position, channel, number,"
                " type, data, created, error, traceback, attempts) SELECT consumer_id, slot, n,"
                " 'c' || n, n, type, data, created, error, traceback, attempts"
                "  FROM pg_eventstream_parked, generate_series(2, 100) AS n"
            )
        text_of(client, url(database, "change"))  # what is cached
        count = 0
        text_of(client, url(database, "change"))
        found.append(count)
    assert found[0] == found[1] > 0


def test_selected_events_are_tried_again_or_skipped(
    database: Database, many: Consumer, login: Login
) -> None:
    client = login("view_consumer", "view_parked", "retry_parked")

    def select(operation: str, ids: list[str]) -> str:
        path = url(database, "operate")
        response = client.post(path, {"operation": operation, "id": ids}, follow=True)
        found = re.findall(r'<li class="(?:success|error)">(.*?)</li>', response.content.decode())
        return html.unescape(found[0])

    def numbers(condition: str) -> list[int]:
        rows = database.fetch(
            f"SELECT number FROM pg_eventstream_parked WHERE {condition} ORDER BY 1"
        )
        return [number for (number,) in rows]

    assert select("retry", names(101, 200)).endswith("will be tried again: 100.")
    assert numbers("retry") == [*range(101, 201)]
    assert "will be tried again" in text_of(client, url(database, "change") + "?p=2")
    assert select("skip-selected", ["orders:7", "orders:999"]).startswith(
        "The consumer 'stock' has not parked 'orders:999'."
    )
    assert select("skip-selected", names(1, 249)) == "Consumer stock: Skipped parked events: 249."
    assert numbers("true") == [250]
    for operation in ("retry", "skip-selected"):
        assert "no event was selected" in select(operation, [])
    assert numbers("retry") == []
