"""The admin in a real browser, on a large table."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.test import Client

from pg_eventstream.servers.processes import accepts, free_port
from tests.support import forked
from tests.support.browser import Page
from tests.support.database import Database
from tests.support.environment import DIRECTORY, child_environment
from tests.support.forked import ForkedProcess
from tests.support.stored_consumer import CONSUMER

ENVIRONMENT = {"DJANGO_SETTINGS_MODULE": "tests.project.admin_settings"}
#: Sent by 1,000 channels within a day. Every thousandth is of a rare type.
FILL = """
    SET session_replication_role = replica;
    INSERT INTO pg_eventstream_event (id, channel, type, data, created)
    SELECT n, 'room ' || n % 1000, CASE WHEN n % 1000 = 0 THEN 'rare' ELSE 'message' END,
           '{"text": "' || repeat('x', (n % 200)::int) || '"}',
           now() - (1 - n / {count}::float8) * interval '1 day'
      FROM generate_series(1, {count}) AS n;
    INSERT INTO pg_eventstream_stream
           (position, channel, eid, event_id, sequenced_at, committed_at)
    SELECT id, channel, (id - 1) / 1000 + 1, id, created, created FROM pg_eventstream_event;
    DELETE FROM pg_eventstream_cursor;
    INSERT INTO pg_eventstream_cursor (position, snapshot, cluster)
    SELECT {count}, pg_current_snapshot(), system_identifier FROM pg_control_system();
    SELECT setval(pg_get_serial_sequence('pg_eventstream_event', 'id'), {count});
"""
EVENTS = "/admin/pg_eventstream/event/"


@pytest.fixture
def address(database: Database) -> Iterator[str]:
    environment = child_environment(None, **ENVIRONMENT)
    migrate = [sys.executable, "-m", "django", "migrate", "--verbosity=0"]
    assert forked.run(migrate, environment).returncode == 0
    port = free_port()
    arguments = [str(port), "--noreload", "--insecure"]
    server = ForkedProcess(
        "runserver",
        [sys.executable, "-m", "django", "runserver", *arguments],
        log_path=DIRECTORY / f"admin-{database.name}.log",
        environment=environment,
    )
    server.start(ready=lambda: accepts(port))
    yield f"http://127.0.0.1:{port}"
    server.kill()


@pytest.mark.faults
@pytest.mark.thorough
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "count",
    [
        20_000,
        pytest.param(
            5_000_000, marks=[pytest.mark.thorough, pytest.mark.faults, pytest.mark.alone]
        ),
    ],
)
def test_each_page_is_fast_on_a_large_table(
    database: Database, address: str, page: Page, count: int
) -> None:
    database.execute(FILL.replace("{count}", str(count)))
    database.execute("ANALYZE")
    client = Client()
    client.force_login(User.objects.create_superuser("ada"))
    page.add_cookie(address, "sessionid", client.cookies["sessionid"].value)
    seconds: dict[str, float] = {}

    def look(name: str) -> None:
        page.wait_for("document.readyState === 'complete'")
        entry = "performance.getEntriesByType('navigation')[0]"
        seconds[name] = page.evaluate(f"{entry}.duration") / 1000
        assert page.evaluate(f"{entry}.responseStatus") == 200, name
        if folder := os.environ.get("PG_EVENTSTREAM_TEST_SCREENSHOTS"):
            page.screenshot(Path(folder) / f"{name.replace(' ', '-')}.png")

    def follow(text: str) -> None:
        """Follow the first link or press the first button with this text."""
        page.evaluate(
            """(text) => {
                window.before = true;
                const all = document.querySelectorAll("#content a, #content input[type=submit]");
                [...all].find((one) => (one.value || one.textContent).trim() === text).click();
            }""",
            text,
        )
        page.wait_for("window.before === undefined")

    def filter_by(**fields: str) -> None:
        page.goto(f"{address}{EVENTS}")
        page.evaluate(
            "(fields) => { for (const [name, value] of Object.entries(fields))"
            " document.querySelector(`[name=${name}]`).value = value; }",
            fields,
        )
        follow("Filter")

    page.goto(f"{address}{EVENTS}")
    look("events")
    follow("Older")
    look("older events")
    first = page.evaluate("document.querySelector('#result_list tbody a').textContent")
    assert first == f"room%20{(count - 100) % 1000}:{(count - 101) // 1000 + 1}"
    filter_by(channel="room 7")
    look("events of a channel")
    assert page.evaluate("document.querySelectorAll('#result_list tbody tr').length") == min(
        100, count // 1000
    )
    filter_by(type="rare")
    look("events of a type")
    assert page.evaluate("document.querySelectorAll('#result_list tbody tr').length") == 10
    filter_by(type="nothing", channel="room 7")
    look("events of no type")
    half = "new Date(Date.now() - 43200000).toISOString().slice(0, 19)"
    filter_by(until=page.evaluate(half))
    look("events of a time")
    filter_by(until=page.evaluate(half), channel="room 7", type="message")
    look("events of a channel type and time")
    follow("room%207:" + page.evaluate(
        "document.querySelector('#result_list tbody a').textContent.split(':')[1]"
    ))  # fmt: skip
    look("event")
    page.goto(f"{address}{EVENTS}1/change/")
    look("oldest event without its position")
    follow("Channels")
    look("channels")
    follow("Next")
    look("more channels")
    follow("State")
    look("state")
    follow("Send a test event")
    look("send")
    page.evaluate(
        "() => { document.querySelector('[name=channel]').value = 'room 7';"
        " document.querySelector('[name=data]').value = '{}'; }"
    )
    follow("Send")
    look("sent")
    page.wait_for("document.body.textContent.includes('Not in order yet')")
    follow("Send again")
    look("send again")
    assert [message for message in page.console if "404" not in message] == []  # the favicon
    if count > 1_000_000:
        print(seconds)  # noqa: T201
        assert max(seconds.values()) < 1, seconds


#: Of a consumer that is stored already.
PARK = """
    INSERT INTO pg_eventstream_parked (consumer_id, slot, position, channel, number, type, data,
                                       created, error, traceback, attempts)
    SELECT id, 0, n, 'orders', n, 'placed', '{"order": ' || n || '}', now(),
           'ValueError: no such product', 'Traceback (most recent call last): …', 5
      FROM pg_eventstream_consumer, generate_series(2, 250) AS n
"""


@pytest.mark.faults
@pytest.mark.thorough
def test_parked_events_are_selected_on_a_page(database: Database, address: str, page: Page) -> None:
    database.execute(CONSUMER)
    database.execute(PARK)
    client = Client()
    client.force_login(User.objects.create_superuser("ada"))
    page.add_cookie(address, "sessionid", client.cookies["sessionid"].value)
    pk = database.value("SELECT id FROM pg_eventstream_consumer")

    def press(text: str, *ids: str) -> None:
        page.goto(f"{address}/admin/pg_eventstream/consumer/{pk}/change/?p=2")
        page.wait_for("document.readyState === 'complete'")
        if folder := os.environ.get("PG_EVENTSTREAM_TEST_SCREENSHOTS"):
            page.screenshot(Path(folder) / f"{text}.png")
        page.evaluate(
            """([text, ids]) => {
                window.before = true;
                for (const id of ids) document.querySelector(`[value="${id}"]`).click();
                const all = document.querySelectorAll("button");
                [...all].find((one) => one.textContent === text).click();
            }""",
            [text, ids],
        )
        page.wait_for("window.before === undefined")

    press("Try selected again", "orders:101", "orders:200")
    retried = "SELECT number FROM pg_eventstream_parked WHERE retry ORDER BY 1"
    assert database.fetch(retried) == [(101,), (200,)]
    press("Skip selected", "orders:102", "orders:103")
    assert database.value("SELECT count(*) FROM pg_eventstream_parked") == 248
