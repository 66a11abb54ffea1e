"""Operations on consumers through PgBouncer in transaction mode, and by a role with few rights.

The process that runs the consumer has a direct connection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from io import StringIO

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connections

from pg_eventstream import send_event, send_events
from pg_eventstream.consumers import Retry, consumer, declare, operations
from pg_eventstream.errors import ConsumerBusy
from pg_eventstream.limits import Limits
from pg_eventstream.management.base import DatabaseCommand
from pg_eventstream.servers.processes import wait_until
from tests.support.consumers import ConsumerProcess, Handled, declared
from tests.support.database import Database
from tests.support.handlers import named, obey
from tests.support.pgbouncer import pgbouncer
from tests.support.roles import as_role, granted

STOCK = {"name": "stock", "handler": "obey", "start": "earliest", "retry": {"attempts": 1}}
#: Fails at its first attempt.
POISON = {"fail": "x", "until_attempt": 2}


@contextmanager
def connected(dsn: str) -> Iterator[None]:
    """Django's connections of this process use this address."""
    info, address = psycopg.conninfo.conninfo_to_dict(dsn), connections["default"].settings_dict
    before = dict(address)
    connections.close_all()
    address.update(USER=info["user"], PORT=info["port"])
    try:
        yield
    finally:
        connections.close_all()
        address.update(before)


@pytest.fixture(params=["pooler", "role"])
def way(
    request: pytest.FixtureRequest, database: Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """How this process is connected: through a pooler, or by a role that is only a consumer."""
    # A command recognises a pooler by a notification that does not arrive.
    monkeypatch.setattr(DatabaseCommand, "limits", Limits(probe=0.1))
    if request.param == "role":
        role = granted(database, "consumer", "sender")
        with connected(as_role(database, role)):
            yield role
    else:
        with pgbouncer(database) as dsn, connected(dsn):
            yield ""


def run(*arguments: str) -> str:
    out = StringIO()
    call_command("eventstream_consumers", *arguments, stdout=out)
    return out.getvalue()


def test_all_operations_beside_a_running_consumer(database: Database, way: str) -> None:
    handled = Handled(database)
    stock = consumer("stock", start="earliest", retry=Retry(1))(named(obey, "stock"))

    def wait_for(*eids: int) -> None:
        handled.wait("stock", len(eids))
        assert stock.wait(timeout=10)
        assert handled.eids("stock").get("orders", []) == [*eids]
        database.execute("DELETE FROM handled")

    def is_parked(*ids: str) -> None:
        wait_until(
            lambda: [e["id"] for e in json.loads(run("parked", "stock", "--json"))] == [*ids],
            timeout=10,
        )

    send_events([("orders", "m", 1), ("orders", "m", POISON), ("orders", "m", POISON)])
    with ConsumerProcess("--processes", "2", environment=declared(STOCK)) as process:
        wait_for(1)
        is_parked("orders:2", "orders:3")
        assert "2 parked events" in run("list")
        assert "ValueError: x" in run("parked", "stock", "--tracebacks")
        assert run("retry", "stock", "orders:2") == "1 event will be tried again.\n"
        wait_for(2)
        assert run("skip", "stock", "orders:3") == "The parked event orders:3 is skipped.\n"
        assert run("pause", "stock") == "The consumer 'stock' is paused.\n"
        between = datetime.now(timezone.utc)
        send_events([("orders", "m", n) for n in (4, 5)])
        assert not stock.wait(timeout=0.2)
        assert " paused, " in run("list")
        assert "not paused any more" in run("resume", "stock")
        wait_for(4, 5)
        for to, eids in (
            ("3", (4, 5)),
            ("orders:4", (5,)),
            (between.isoformat(), (4, 5)),
            ("latest", ()),
        ):
            assert "continues after position" in run("reset", "stock", "--to", to)
            wait_for(*eids)
        database.execute("UPDATE pg_eventstream_event SET data = '1'")
        for to in ("earliest", "1h"):
            assert "are handled again" in run("reset", "stock", "--to", to)
            wait_for(1, 2, 3, 4, 5)
        send_event("orders", "m", {"sleep": 3})
        working = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"
        wait_until(lambda: database.value(working) == 1, timeout=10)
        with pytest.raises(ConsumerBusy, match="has worked on the event orders:6"):
            operations.pause("default", "stock", Limits(command_patience=0.3))
        wait_for(6)
        assert "is 'goods' now" in run("rename", "stock", "goods")
        process.wait_for_log("it was renamed to 'goods'")
        if way:
            with pytest.raises(CommandError) as refused:
                run("remove", "goods", "--yes")
            assert f"GRANT DELETE ON pg_eventstream_consumer TO {way}" in str(refused.value)
            assert database.fetch("SELECT name FROM pg_eventstream_consumer") == [("goods",)]
            database.execute(f"GRANT DELETE ON pg_eventstream_consumer TO {way}")
        assert run("remove", "goods", "--yes") == "The consumer 'goods' is removed.\n"
        assert "ERROR" not in re.sub(r"ERROR consumer stock: event orders:[23]", "", process.log)
    assert database.fetch("SELECT FROM pg_eventstream_consumer") == []


@pytest.mark.faults
@pytest.mark.thorough
def test_role_that_is_a_waiter_waits(database: Database) -> None:
    handled = Handled(database)
    stock = consumer("stock", start="earliest")(named(obey, "stock"))
    del declare._declared["stock"]
    with (
        connected(as_role(database, granted(database, "waiter", "sender"))),
        ConsumerProcess(environment=declared(STOCK)),
    ):
        send_event("orders", "m", 1)
        assert stock.wait(timeout=10)
        assert handled.eids("stock") == {"orders": [1]}
