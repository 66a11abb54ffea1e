"""A sender's process is killed; its committed events are delivered, and no others."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from pg_eventstream.servers.processes import wait_until
from tests.support.chance import seeded
from tests.support.database import Database
from tests.support.environment import THOROUGH
from tests.support.faults import locked
from tests.support.publisher import PublisherProcess
from tests.support.sse_client import OpenStream, SSEClient

pytestmark = pytest.mark.faults


ROUNDS, KILLS = 12 if THOROUGH else 1, 3

SENDER = """
import itertools, sys
import django
django.setup()
from django.db import transaction
from pg_eventstream import send_event
for n in itertools.count():
    with transaction.atomic():
        for part in "ab":
            send_event(sys.argv[1], "message", f"{sys.argv[2]}-{n}{part}", json_encode=False)
        print("sent", n, flush=True)
    print("committed", n, flush=True)
"""


class Sender:
    """Commits transactions of two events, and reports its progress."""

    def __init__(self, channel: str, name: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-c", SENDER, channel, name], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        self._said = self._process.stdout

    def wait_for_word(self) -> str:
        return self._said.readline().strip()

    def kill(self) -> list[str]:
        """Kill it. Returns its output until then."""
        self._process.kill()
        self._process.wait()
        with self._said as said:
            return said.read().splitlines()


@pytest.mark.timeout(600)
def test_sender_killed_at_any_moment_sends_what_it_committed_and_nothing_else(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    chance = seeded()
    client = stream(channel).wait_open()
    committed: list[str] = []
    perhaps: set[str] = set()
    for attempt in range(ROUNDS):
        for sender in [Sender(channel, f"{attempt}.{number}") for number in range(KILLS)]:
            said = [sender.wait_for_word()]
            time.sleep(chance.uniform(0, 0.05))  # the random moment
            said += sender.kill()
            # The last line can be cut off by the kill.
            words = [line.split() for line in said if line.count(" ") == 1]
            numbers = [int(number) for word, number in words if word == "committed"]
            committed += [f"{sender.name}-{n}{part}" for n in numbers for part in "ab"]
            next_one = int(words[-1][1]) + (words[-1][0] == "committed")
            perhaps |= {f"{sender.name}-{next_one}{part}" for part in "ab"}
    wait_for_sessions_to_end(database)
    check(database, client, channel, committed, perhaps)


def test_sender_killed_during_commit_sends_all_or_nothing(
    database: Database, publisher: PublisherProcess, stream: OpenStream, channel: str
) -> None:
    client = stream(channel).wait_open()
    senders = [Sender(channel, str(number)) for number in range(2)]
    committed: list[str] = []
    perhaps: set[str] = set()
    for sender in senders:
        assert sender.wait_for_word() == "sent 0"
    # The table that COMMIT writes to.
    with locked(database, "LOCK TABLE pg_eventstream_outbox IN SHARE MODE"):
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND query = 'COMMIT' AND wait_event_type = 'Lock'"
        )
        wait_until(lambda: database.value(waiting) == len(senders), timeout=30)
        for sender in senders:
            last = 0
            for word, number in map(str.split, sender.kill()):
                last = int(number)
                if word == "committed":
                    committed += [f"{sender.name}-{last}{part}" for part in "ab"]
            perhaps |= {f"{sender.name}-{last}{part}" for part in "ab"}
    wait_for_sessions_to_end(database)
    check(database, client, channel, committed, perhaps)


def wait_for_sessions_to_end(database: Database) -> None:
    """Wait until the server has ended the sessions of dead clients."""
    others = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        " AND NOT starts_with(application_name, 'pg_eventstream ')"
    )
    wait_until(lambda: database.value(others) == 0, timeout=30)


def check(
    database: Database, client: SSEClient, channel: str, committed: list[str], perhaps: set[str]
) -> None:
    """The client has all committed transactions once and whole, with their events in order."""
    database.send(channel, "last")
    client.wait_for(lambda: bool(client.events) and client.events[-1].data == "last")
    got = [event.data for event in client.events][:-1]
    assert [event.eids[channel] for event in client.events] == [*range(1, len(got) + 2)]
    assert len(set(got)) == len(got)
    assert set(committed) <= set(got) <= {*committed, *perhaps}
    # Events of two transactions that commit at the same time can alternate.
    firsts, seconds = ([data for data in got if data.endswith(part)] for part in "ab")
    assert {data[:-1] for data in firsts} == {data[:-1] for data in seconds}
    assert all(got.index(f"{data[:-1]}a") < got.index(data) for data in seconds)
    assert by_sender([data for data in got if data not in perhaps]) == by_sender(committed)


def by_sender(events: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for data in events:
        found.setdefault(data.split("-")[0], []).append(data)
    return found
