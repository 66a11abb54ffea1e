"""The promises of `pg_eventstream.testing` to the tests of a project."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import unittest
from contextlib import aclosing
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.contrib.auth.models import User
from django.core import mail
from django.db import IntegrityError, connection, transaction
from django.test import AsyncClient, TestCase, TransactionTestCase, override_settings

from pg_eventstream import asend_event, send_event, send_events
from pg_eventstream.permission import channel_permission_changed
from pg_eventstream.testing import SentEvent, captured_events
from tests.project.app.models import Membership
from tests.project.asgi import application
from tests.support import forked
from tests.support.database import Database

ROOT = Path(__file__).parents[2]


async def first_piece(response: Any) -> str:
    """The first piece of a response."""
    if not response.streaming:
        return str(response.content, "utf-8")
    async with aclosing(aiter(response.streaming_content)) as pieces:
        return str(await asyncio.wait_for(anext(pieces), 20), "utf-8")


class ReadStreams:
    """A test's data still exists after it has read a stream in any way."""

    async_client: AsyncClient

    async def test_async_client_in_an_asynchronous_test(self) -> None:
        await User.objects.acreate(username="ann")
        response = await self.async_client.get("/events/?channel=a")
        assert "event: stream-open" in await first_piece(response)
        assert await User.objects.acount() == 1

    def test_async_client_in_a_synchronous_test(self) -> None:
        User.objects.create(username="ann")

        async def read() -> str:
            return await first_piece(await self.async_client.get("/events/?channel=a"))

        assert "event: stream-open" in async_to_sync(read)()
        assert User.objects.count() == 1

    async def test_clients_that_call_the_application_as_servers_do(self) -> None:
        await User.objects.acreate(username="ann")
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/events/",
            "query_string": b"channel=a",
            "headers": [(b"host", b"testserver")],
            "server": ("testserver", 80),
        }
        client: Any = ApplicationCommunicator(application, scope)  # type: ignore[no-untyped-call]
        await client.send_input({"type": "http.request"})
        await client.receive_output(20)
        assert b"event: stream-open" in (await client.receive_output(20))["body"]
        assert await User.objects.acount() == 1
        await client.send_input({"type": "http.disconnect"})
        await client.wait(20)
        assert await User.objects.acount() == 1

    async def test_permissions_that_the_test_has_written_are_there(self) -> None:
        ann = await User.objects.acreate(username="ann")
        await Membership.objects.acreate(user_id=ann.pk, channel="room")
        await self.async_client.aforce_login(ann)
        with override_settings(
            EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Members"
        ):
            for channel, event in (("room", "stream-open"), ("other", "stream-error")):
                response = await self.async_client.get(f"/events/?channel={channel}")
                assert f"event: {event}" in await first_piece(response)


class InTestCase(ReadStreams, TestCase):
    """Its transaction never commits."""

    __test__ = False

    def test_events_come_in_the_order_sent_with_all_that_was_said(self) -> None:
        send_event("orders", "paid", "before the block")
        with captured_events() as sent:
            send_event("orders", "paid", {"order": 7}, skip_user_ids=[3, "x"], meta={"v": 1})
            send_events([("orders", "shipped", n) for n in range(3)])
        send_event("orders", "paid", "behind the block")
        assert sent[0] == SentEvent("orders", "paid", '{"order": 7}', ("3", "x"), {"v": 1})
        assert [(e.channel, e.type, e.json()) for e in sent] == [
            ("orders", "paid", {"order": 7}),
            *(("orders", "shipped", n) for n in range(3)),
        ]

    def test_an_insert_in_sql_counts(self) -> None:
        with captured_events() as sent, connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO pg_eventstream_event (channel, data)"
                " VALUES ('invoices', jsonb_build_object('invoice', 7))"
            )
        (event,) = sent
        assert (event.channel, event.type, event.json()) == ("invoices", "message", {"invoice": 7})

    def test_what_a_savepoint_rolled_back_was_not_sent(self) -> None:
        with captured_events() as sent:
            send_event("a", "message", 1)
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                send_event("a", "message", 2)
                assert len(sent) == 2
                raise ZeroDivisionError
            assert len(sent) == 1
            send_event("a", "message", 3)
        assert [e.json() for e in sent] == [1, 3]

    def test_inside_the_block_it_is_live_and_after_it_frozen(self) -> None:
        with captured_events() as sent:
            assert sent == []
            send_event("a", "message", 1)
            assert len(sent) == 1
            send_event("a", "message", 2)
            assert [e.json() for e in sent[:2]] == [1, 2]
        send_event("a", "message", 3)
        assert len(sent) == 2

    def test_a_block_in_a_block_has_its_own_share(self) -> None:
        with captured_events() as outer:
            send_event("a", "message", 1)
            with captured_events() as inner:
                send_event("a", "message", 2)
            send_event("a", "message", 3)
        assert [e.json() for e in inner] == [2]
        assert [e.json() for e in outer] == [1, 2, 3]

    def test_what_a_block_sent_before_its_exception_is_captured(self) -> None:
        with pytest.raises(ZeroDivisionError), captured_events() as sent:
            send_event("a", "message", 1)
            raise ZeroDivisionError
        assert [e.json() for e in sent] == [1]

    def test_a_block_that_breaks_its_transaction_has_sent_nothing(self) -> None:
        with (
            pytest.raises(IntegrityError, match="channel_not_empty"),
            transaction.atomic(),
            captured_events() as sent,
            connection.cursor() as cursor,
        ):
            send_event("a", "message", 1)
            cursor.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('', '')")
        assert sent == []

    def test_a_failing_assertion_shows_what_was_sent(self) -> None:
        with captured_events() as sent:
            send_event("a", "message", {"n": 1})
        expected = SentEvent("a", "message", '{"n": 1}')
        with pytest.raises(AssertionError, match=r"type='message', data='\{\"n\": 1\}'"):
            self.assertEqual(sent, [])  # noqa: PT009
        assert sent == [expected]
        assert sent != []
        assert sent != [expected, expected]
        assert sent != "a"

    def test_a_changed_permission_is_no_event_but_can_be_asserted(self) -> None:
        with captured_events() as sent:
            send_event("room", "message", 1)
            channel_permission_changed(User(pk=17), "room")
            channel_permission_changed(None, "room")
        assert [e.channel for e in sent] == ["room"]
        assert sent.permission_changes == [("17", "room"), ("anonymous", "room")]

    async def test_asynchronous_code_captures_with_async_with(self) -> None:
        await asend_event("a", "message", "before the block")
        async with captured_events() as sent:
            await asend_event("a", "message", 1)
            await sync_to_async(send_event)("a", "message", 2)
        assert [e.json() for e in sent] == [1, 2]

    async def test_an_exception_passes_through_async_with(self) -> None:
        with pytest.raises(ZeroDivisionError):
            async with captured_events() as sent:
                await asend_event("a", "message", 1)
                raise ZeroDivisionError
        assert len(sent) == 1


class InTransactionTestCase(ReadStreams, TransactionTestCase):
    """Transactions commit, and other connections send as well."""

    __test__ = False

    async def test_stream_that_the_test_reads_has_what_it_sends(self) -> None:
        response: Any = await self.async_client.get("/events/?channel=a")
        async with aclosing(aiter(response.streaming_content)) as pieces:
            assert b"event: stream-open" in await asyncio.wait_for(anext(pieces), 20)
            await asend_event("a", "message", 1)
            assert (
                await asyncio.wait_for(anext(pieces), 20) == b"event: message\nid: a:1\ndata: 1\n\n"
            )

    async def test_session_of_the_tests_connection_lives_on(self) -> None:
        """For example settings, temporary tables and locks."""

        def backend() -> int:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                return int(cursor.fetchone()[0])

        before = await sync_to_async(backend)()
        await first_piece(await self.async_client.get("/events/?channel=a"))
        assert await sync_to_async(backend)() == before

    def other(self) -> Any:
        return Database.connect(self.database, autocommit=False)  # type: ignore[attr-defined]

    def insert(self, other: Any, data: str) -> None:
        other.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', %s)", [data])

    def test_what_committed_was_sent_and_what_rolled_back_was_not(self) -> None:
        with captured_events() as sent:
            with transaction.atomic():
                send_event("a", "message", 1)
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                send_event("a", "message", 2)
                raise ZeroDivisionError
            send_event("a", "message", 3)
        assert [e.json() for e in sent] == [1, 3]

    def test_others_count_as_soon_as_they_commit(self) -> None:
        with self.other() as other, captured_events() as sent:
            send_event("a", "message", 1)
            self.insert(other, "2")
            assert [e.json() for e in sent] == [1]
            other.commit()
            self.insert(other, "3")
        assert [e.json() for e in sent] == [1, 2]

    def test_what_others_inserted_before_the_block_does_not_count(self) -> None:
        with self.other() as other:
            self.insert(other, "1")
            with captured_events() as sent:
                other.commit()
                send_event("a", "message", 2)
            assert [e.json() for e in sent] == [2]


@pytest.mark.parametrize(
    ("case", "promise"),
    [
        (case, promise)
        for case in (InTestCase, InTransactionTestCase)
        for promise in unittest.defaultTestLoader.getTestCaseNames(case)
    ],
)
def test_in_djangos_test_cases(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    case: type[TransactionTestCase],
    promise: str,
) -> None:
    # A test case makes one, by which the library knows that it runs in a project's tests.
    monkeypatch.setattr(mail, "outbox", [], raising=False)
    test = case(promise)
    test.database = database  # type: ignore[attr-defined]
    result = unittest.TestResult()
    unittest.TestSuite([test]).run(result)
    assert result.testsRun == 1
    assert result.wasSuccessful(), result.errors or result.failures


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, *command],
        directory=cwd,
        environment={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_pytest_fixture_holds_what_the_test_sent(database: Database, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("import django\n\ndjango.setup()\n")
    (tmp_path / "test_shop.py").write_text(
        dedent(
            """
            from pg_eventstream import send_event

            def test_payment(sent_events):
                assert not sent_events
                send_event("orders", "paid", {"order": 7})
                assert [(e.channel, e.json()) for e in sent_events] == [("orders", {"order": 7})]

            def test_quiet(sent_events):
                assert sent_events == []

            def test_failing(sent_events):
                send_event("orders", "paid", "shown")
                assert sent_events == []
            """
        )
    )
    done = run("-m", "pytest", "-p", "pg_eventstream.testing", cwd=tmp_path)
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert """SentEvent(channel='orders', type='paid', data='"shown"'""" in done.stdout


def test_pytest_is_not_needed(tmp_path: Path) -> None:
    script = "import sys; sys.modules['pytest'] = None; from pg_eventstream.testing import *"
    done = run("-c", f"{script}; captured_events", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
