"""``manage.py eventstream_consumers``: what it shows, what it refuses, and what it changes."""

from __future__ import annotations

import json
import re
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from pg_eventstream import send_event, send_events
from pg_eventstream.consumers import Retry, consumer, declare
from pg_eventstream.servers.processes import wait_until
from tests.support.consumers import Handled, declared, handle_all, running_worker
from tests.support.database import Database
from tests.support.environment import child_environment
from tests.support.handlers import named, obey
from tests.support.terminal import Terminal


def make(name: str, **options: Any) -> declare.Consumer:
    return consumer(name, **{"start": "earliest", "retry": Retry(1), **options})(named(obey, name))


def run(*arguments: str) -> str:
    out = StringIO()
    call_command("eventstream_consumers", *arguments, stdout=out)
    return out.getvalue()


def test_list_without_consumers(database: Database) -> None:
    assert "There are no consumers" in run("list")


def test_list_and_parked(database: Database, handled: Handled) -> None:
    send_events([("orders", "placed", 1), ("orders", "placed", {"fail": "no such product"})])
    send_event("mails", "sent", {"fail": "\x1b[31mred\n" + "word " * 40})
    make("never")
    gone, paused, stock = make("gone"), make("paused"), make("stock")
    stops = make("stops", on_failure="stop")
    for one in (gone, paused, stock):
        handle_all(one)
    send_event("orders", "placed", 1)
    run("pause", "paused")
    del declare._declared["gone"]
    with running_worker(stock, stops):
        handled.wait("stock", 2)
        handled.wait("stops", 1)
        listed = run("list")
        found = {one["name"]: one for one in json.loads(run("list", "--json"))}
    flat = " ".join(listed.split())
    assert "gone  orphaned, not running, 1 event behind, " in listed
    assert "manage.py eventstream_consumers remove gone" in flat
    assert "never  has never run" in listed
    assert "paused  paused, not running, 1 event behind, " in listed
    assert "stock  running, nothing behind" in listed
    assert "2 parked events: manage.py eventstream_consumers parked stock" in listed
    assert "stops  stopped, 3 events behind" in listed
    assert "has stopped at orders:2 after 1 attempt: ValueError: no such product" in flat
    assert ": 16 slots, heartbeat " in listed
    assert max(map(len, listed.splitlines())) <= 80
    assert listed.isascii() or "\N{REPLACEMENT CHARACTER}" in listed
    assert found["stock"]["parked"] == 2
    assert "orders:2" in {slot["event"] for slot in found["stops"]["stopped"]}
    shown = run("parked", "stock")
    assert shown.splitlines()[0] == "orders:2"
    assert "    placed, 1 attempt, parked 20" in shown
    assert "    ValueError: no such product" in shown
    assert "Traceback" not in shown
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "Traceback" in run("parked", "stock", "--tracebacks")
    assert "Traceback" in json.loads(run("parked", "stock", "--json"))[0]["traceback"]
    assert "has no parked events" in run("parked", "stops")


def test_changes(database: Database, handled: Handled) -> None:
    send_events([("orders", "placed", 1), ("orders", "placed", {"fail": "x", "until_attempt": 3})])
    stock = make("stock")
    handle_all(stock)
    assert run("pause", "stock") == "The consumer 'stock' is paused.\n"
    assert run("pause", "stock") == "The consumer 'stock' was paused already.\n"
    with pytest.raises(CommandError, match="To let it continue: manage"):
        send_event("orders", "placed", 3)
        run("run", "stock", "--once")
    assert run("resume", "stock") == "The consumer 'stock' is not paused any more.\n"
    assert run("resume", "stock") == "The consumer 'stock' was neither paused nor stopped.\n"
    assert run("run", "stock", "--once") == "1 event handled.\n"
    text = run("retry", "stock", "orders:2")
    assert text == "1 event will be tried again as soon as a process runs the consumer.\n"
    assert "will be tried again" in run("parked", "stock")
    assert run("run", "stock", "--once") == "0 events handled.\n"
    assert "2 attempts" in run("parked", "stock")
    assert run("retry", "stock", "--all").startswith("1 event will")
    run("run", "--once")
    assert handled.eids("stock")["orders"] == [1, 3, 2]
    text = run("reset", "stock", "--to", "orders:1")
    assert text.startswith("The consumer 'stock' continues after position 1. Events up to pos")
    assert "has no function for before_reset" in text
    text = run("rename", "stock", "goods")
    assert text.startswith("The consumer 'stock' is 'goods' now. Code that has the old name")
    with pytest.raises(CommandError, match="was renamed to 'goods'"):
        run("run", "stock", "--once")
    assert "stock  was renamed to goods" in run("list")
    assert run("remove", "goods") == "The consumer 'goods' is removed.\n"
    handle_all(stock)
    with pytest.raises(CommandError, match=r"the code still declares it \(.*To remove it in spite"):
        run("remove", "stock")
    with running_worker(stock):
        send_event("orders", "placed", 4)
        handled.wait("stock", 6)
        with pytest.raises(CommandError, match=r"processes run it now \(16 slots\)"):
            run("remove", "stock")
    assert "is removed" in run("remove", "stock", "--yes")


MISTAKES = [
    (["run", "--processes", "0"], "--processes: it must be a whole number from 1 to 64"),
    (["run", "--processes", "-1"], "--processes: it must be a whole number from 1 to 64"),
    (["run", "--processes", "many"], "--processes: it must be a whole number from 1 to 64"),
    (["run", "--processes", "2", "--once"], "--once runs in one process"),
    (["run", "other"], "There is no consumer 'other' in the code. There are: stock."),
    (["retry", "stock"], "Name the events to try again, or use --all"),
    (["retry", "stock", "a:1", "--all"], "Name the events to try again, or use --all"),
    (["retry", "stock", "a:1"], "has not parked 'a:1'. Parked are: none."),
    (["skip", "stock", "a:1"], "does not fail at 'a:1', and has not parked it. Events to skip"),
    (["reset", "stock"], "the following arguments are required: --to"),
    (["reset", "stock", "--to", "yesterday"], "'yesterday' is no place in the stream."),
    (["rename", "stock", "a\nb"], "must not contain CR, LF or NUL"),
    (["parked", "stocks"], "There is no consumer 'stocks'. Did you mean 'stock'?"),
    (["pause", "stocks"], "There is no consumer 'stocks'. Did you mean 'stock'?"),
    ([], "the following arguments are required: COMMAND"),
    (["list", "--database", "other"], "The database 'other' is not in DATABASES"),
]


def test_mistakes_are_told(database: Database, handled: Handled) -> None:
    handle_all(make("stock"))
    for arguments, message in MISTAKES:
        with pytest.raises(CommandError) as caught:
            run(*arguments)
        assert message in str(caught.value)


@pytest.mark.faults
@pytest.mark.thorough
def test_rebuild_shows_how_far_it_is_and_ends_with_ctrl_c(
    database: Database, handled: Handled
) -> None:
    send_events([(f"c{n % 7}", "message", {"sleep": 0.01}) for n in range(400)])
    environment = child_environment(
        None, **declared({"name": "stock", "handler": "obey", "start": "earliest"})
    )
    command = ["eventstream_consumers", "run", "stock", "--once"]
    for _ in range(2):
        before = handled.count("stock")
        with Terminal(*command, environment=environment) as terminal:
            terminal.wait_for(" left")
            wait_until(lambda: handled.count("stock") >= before + 20, timeout=20)  # noqa: B023
            terminal.wait_for("%  ")
            terminal.interrupt()
            assert terminal.wait() == 1
            assert "Traceback" not in terminal.output
        [shown] = re.findall(r"Interrupted\. ([\d,]+) events? handled", terminal.output)
        assert handled.count("stock") == before + int(shown)
        assert re.search(
            r"\r\[#* *\] +\d+%  [\d,]+ events?, [\d,]+/s, [\d,]+ left", terminal.output
        )
    database.execute("UPDATE pg_eventstream_event SET data = '{}'")
    with Terminal(*command, environment=environment) as terminal:
        assert terminal.wait() == 0
    assert sorted(handled.eids("stock").values())[-1] == [*range(1, 59)]
    assert handled.count("stock") == 400
    assert database.value("SELECT max(attempt) FROM handled") == 1
