"""Whatever a handler does: its event is parked, and all others are handled once, in order."""

from __future__ import annotations

from typing import Any

import pytest

from pg_eventstream import send_event, send_events
from pg_eventstream.servers.processes import wait_until
from tests.support.consumers import ConsumerProcess, Handled, declared
from tests.support.database import Database

pytestmark = [pytest.mark.faults]

#: What a handler does, and what its error says.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "raises": ({"fail": "no such product"}, "ValueError: no such product"),
    "raises what cannot be stored": ({"fail": "\0 \ud800"}, "ValueError: \ufffd ?"),
    "exits": ({"exit": 3}, "SystemExit: 3"),
    "recurses": ({"recurse": 1}, "RecursionError: "),
    "has an error of the database": ({"sql": "SELECT 1 / 0"}, "DataError: division by zero"),
    "catches an error of the database": ({"swallow": 1}, "The handler caught an error of the"),
    "rolls back": ({"sql": "ROLLBACK"}, "The handler ended its transaction"),
    "rolls back and continues": (
        {"sql": "ROLLBACK; SELECT 1"},
        "The handler ended its transaction",
    ),
    "asks for a rollback": ({"rollback": 1}, "transaction.set_rollback(True)"),
    "closes the connection": ({"close": 1}, "The handler closed the connection"),
    "ends its session": ({"terminate": 1}, "terminating connection"),
    "violates a deferred constraint": (
        {"sql": "INSERT INTO child VALUES (1)"},
        "violates foreign key constraint",
    ),
    "kills its process": ({"kill": 1}, "The process that handled it died."),
    "hangs": ({"sleep": 60}, "had not returned after 0.5 seconds"),
    "hangs in the database": ({"sql": "SELECT pg_sleep(60)"}, "had not returned after 0.5 seconds"),
}
THOROUGH_ONLY = {"recurses", "has an error of the database", "rolls back", "exits"}
#: The error shows in the next statement already, if the handler executes one.
LAST = {"catches an error of the database", "asks for a rollback", "closes the connection"}
#: What it writes after that is committed, each time.
LASTING = {"rolls back", "rolls back and continues"}


def cases() -> list[Any]:
    return [
        pytest.param(
            {**order, "recorded": True} if recorded else order,
            error,
            id=f"{name} {'after' if recorded else 'before'} writing",
            marks=[pytest.mark.thorough] * (name in THOROUGH_ONLY or not recorded),
        )
        for name, (order, error) in WRONG.items()
        for recorded in (True, False)
        if recorded or name not in LAST | LASTING
    ]


@pytest.mark.parametrize(("order", "error"), cases())
def test_event_whose_handler_goes_wrong_is_parked_and_all_others_are_handled_once(
    database: Database, order: dict[str, Any], error: str
) -> None:
    handled = Handled(database)
    database.execute(
        "CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (id int REFERENCES parent"
        " DEFERRABLE INITIALLY DEFERRED)"
    )
    send_events([("c", "message", n) for n in range(3)])
    send_event("c", "message", order)
    send_events([(f"c{n % 5}" if n % 2 else "c", "message", n) for n in range(10)])
    environment = declared(
        {
            "name": "stock",
            "handler": "obey",
            "start": "earliest",
            "timeout": 0.5,
            "batch": 4,
            "retry": {"attempts": 2, "backoff": 0.01},
        }
    )
    with ConsumerProcess(environment=environment) as process:
        handled.wait("stock", 13)
        wait_until(lambda: database.value("SELECT count(*) FROM pg_eventstream_parked"), timeout=20)
        send_event("c", "message", "last")
        handled.wait("stock", 14)
    assert database.fetch("SELECT channel, number, attempts FROM pg_eventstream_parked") == [
        ("c", 4, 2)
    ], process.log
    assert error in database.value("SELECT error FROM pg_eventstream_parked"), process.log
    expected = [1, 2, 3, *range(5, 11)]
    assert handled.eids("stock") == {"c": expected, **{f"c{n}": [1] for n in range(5)}}, process.log
    assert database.fetch("SELECT FROM pg_eventstream_slot WHERE attempts > 0 OR stopped") == []


@pytest.mark.parametrize("batch", [1, 4])
def test_handler_that_commits_by_itself_loses_nothing(database: Database, batch: int) -> None:
    """It is told so. Of a batch, events before it can be handled again."""
    handled = Handled(database)
    send_events([("c", "message", n) for n in range(2)])
    send_event("c", "message", {"recorded": True, "sql": "COMMIT"})
    send_events([("c", "message", n) for n in range(4)])
    declaration = {"name": "stock", "handler": "obey", "start": "earliest", "batch": batch}
    with ConsumerProcess(environment=declared(declaration)) as process:
        process.wait_for_log("The handler ended its transaction")
        wait_until(lambda: {7} <= {*handled.eids("stock").get("c", [])}, timeout=30)
    eids = handled.eids("stock")["c"]
    assert [*dict.fromkeys(eids)] == [1, 2, 3, 4, 5, 6, 7]
    assert batch > 1 or len(eids) == 7
    assert "The handler ended its transaction" in process.log
