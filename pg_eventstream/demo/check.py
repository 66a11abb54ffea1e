"""The automatic check: many senders at once, two clients, and a table of the result.

Half of the events are sent by `send_event`, half by psql as a role that may only INSERT events.
All transactions insert their event first and then wait for the lock on one row, so that the order
of the commits differs from the order of the INSERTs. Each transaction increments a counter in that
row, whose values are the true commit order.

The first half of the transactions is sent as fast as possible, to test the order. The second half
is sent with pauses, to show the latency of a system that is not at its limit.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import urlsplit

import django
from django.db import connection, transaction

from pg_eventstream import send_event
from pg_eventstream.demo import settings

_CHANNEL = "demo"
_ROLE = "demo_sender"
_SENDERS = 5  # of each kind
_COMMITTED, _ROLLED_BACK = 100, 10  # transactions of each sender
_PAUSE = 0.05  # seconds after each transaction of the second half
_AWAY_AFTER, _AWAY_SECONDS = 300, 1.0
_DEADLINE = 30.0  # seconds for the senders, and again for the clients
_LINGER = 1.0  # seconds to wait for duplicates after the last event

_NUMBERS = range(1, _COMMITTED + _ROLLED_BACK + 1)  # one for each transaction of a sender
_RUN = uuid.uuid4().hex

# The last statement before COMMIT or ROLLBACK. It reads the clock after the wait for the row.
_COUNT_UP = """
    UPDATE pg_eventstream_demo_counter SET value = value + 1 WHERE name = 'check'
    RETURNING value, extract(epoch FROM clock_timestamp())
"""


@dataclass(frozen=True, slots=True)
class Sent:
    """A committed transaction: its place in the commit order, and the time before its COMMIT."""

    order: int
    at: float
    in_burst: bool


@dataclass(frozen=True, slots=True)
class Received:
    sender: str
    number: int
    commits: bool
    eid: int
    at: float


Key = tuple[str, int]  # a sender's name, and the number of its transaction


class Client(threading.Thread):
    """A minimal EventSource: it reconnects with the last id that it received.

    After `away_after` events it disconnects once for `_AWAY_SECONDS`.
    """

    def __init__(self, name: str, away_after: int | None = None) -> None:
        super().__init__(name=name, daemon=True)
        self.received: list[Received] = []
        self.eids: list[int] = []
        self.connections = 0
        self.resets = 0
        self.error: str | None = None
        self.opened = threading.Event()
        self._away_after = away_after
        self._last_id: str | None = None

    def run(self) -> None:
        while True:
            try:
                self._stream()
            except (OSError, http.client.HTTPException) as error:
                self.error = repr(error)
            time.sleep(0.1)

    def _stream(self) -> None:
        address = urlsplit(settings.URL)
        # Longer than the interval of keep-alives: a connection that is silent for longer is dead.
        link = http.client.HTTPConnection(address.netloc, timeout=30)
        headers = {"Accept": "text/event-stream"}
        if self._last_id is not None:
            headers["Last-Event-ID"] = self._last_id
        link.request("GET", f"/events/?channel={_CHANNEL}", headers=headers)
        response = link.getresponse()
        self.connections += 1
        try:
            if response.status != 200:
                raise http.client.HTTPException(f"{response.status} {response.reason}")
            for fields in _events(response):
                self._take(fields)
                if self._away_after is not None and len(self.received) >= self._away_after:
                    self._away_after = None
                    break
            else:
                return
        finally:
            response.close()
            link.close()
        time.sleep(_AWAY_SECONDS)

    def _take(self, fields: dict[str, str]) -> None:
        at = time.time()
        if fields.get("id"):
            self._last_id = fields["id"]
        match fields.get("event"):
            case "stream-open":
                if not self.opened.is_set():
                    self.eids.append(_eid(fields["id"]))
                    self.opened.set()
            case "stream-reset":
                self.resets += 1
            case "stream-error":
                self.error = fields["data"]
            case "check":
                data = json.loads(fields["data"])
                self.eids.append(_eid(fields["id"]))
                if data["run"] == _RUN:
                    self.received.append(
                        Received(data["sender"], data["number"], data["commits"], self.eids[-1], at)
                    )
            case "keep-alive":
                pass
            case _:  # sent to this channel by someone else, and part of the order as well
                self.eids.append(_eid(fields["id"]))


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, str]]:
    """Yield the fields of each event of a stream."""
    fields: dict[str, str] = {}
    while line := response.readline():
        text = line.decode().rstrip("\r\n")
        if text:
            name, _, value = text.partition(":")
            fields[name] = value.removeprefix(" ")
        else:
            if "data" in fields:
                yield fields
            fields = {}


def _eid(event_id: str) -> int:
    """The number in `demo:5`, which can be followed by more ids or a space."""
    channel, _, number = event_id.strip().split(",")[0].rpartition(":")
    if channel != _CHANNEL:
        raise ValueError(f"unexpected id {event_id!r}")
    return int(number)


def _send_with_django(sender: str) -> dict[Key, Sent]:
    sent = {}
    try:
        for number in _NUMBERS:
            commits = _commits(number)
            with transaction.atomic():
                send_event(_CHANNEL, "check", _data(sender, number, commits))
                with connection.cursor() as cursor:
                    cursor.execute(_COUNT_UP)
                    order, at = cursor.fetchone()
                transaction.set_rollback(not commits)
            if commits:
                sent[sender, number] = Sent(order, float(at), _in_burst(number))
            if not _in_burst(number):
                time.sleep(_PAUSE)
    finally:
        connection.close()
    return sent


def _send_with_psql(sender: str) -> dict[Key, Sent]:
    script = []
    for number in _NUMBERS:
        data = json.dumps(_data(sender, number, _commits(number)))
        script += [
            "BEGIN;",
            "INSERT INTO pg_eventstream_event (channel, type, data)",
            f"VALUES ('{_CHANNEL}', 'check', '{data}');",
            f"{_COUNT_UP.rstrip()}, {number};",
            "COMMIT;" if _commits(number) else "ROLLBACK;",
        ]
        if not _in_burst(number):
            script.append(f"DO 'BEGIN PERFORM pg_sleep({_PAUSE}); END';")
    database = settings.DATABASES["default"]
    result = subprocess.run(
        [
            settings.PSQL,
            *("--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--field-separator= "),
            *("--set", "ON_ERROR_STOP=1", "--file=-"),
            f"postgresql://{_ROLE}@{database['HOST']}:{database['PORT']}/{database['NAME']}",
        ],
        input="\n".join(script),
        stdout=subprocess.PIPE,
        text=True,
        timeout=_DEADLINE,
        check=True,
    )
    sent = {}
    for line in result.stdout.splitlines():
        order, at, count = line.split()
        if _commits(int(count)):
            sent[sender, int(count)] = Sent(int(order), float(at), _in_burst(int(count)))
    return sent


def _commits(number: int) -> bool:
    return number % ((_COMMITTED + _ROLLED_BACK) // _ROLLED_BACK) != 0


def _in_burst(number: int) -> bool:
    return number <= _NUMBERS[-1] // 2


def _data(sender: str, number: int, commits: bool) -> dict[str, object]:
    return {"run": _RUN, "sender": sender, "number": number, "commits": commits}


def _prepare() -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO pg_eventstream_demo_counter (name, value) VALUES ('check', 0)"
            " ON CONFLICT DO NOTHING"
        )
        cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [_ROLE])
        if cursor.fetchone() is None:
            cursor.execute(f"CREATE ROLE {_ROLE} LOGIN")
        cursor.execute(
            f"GRANT INSERT (channel, type, data, skip_user_ids) ON pg_eventstream_event TO {_ROLE}"
        )
        # The table that its transactions change stands for the sender's own data.
        cursor.execute(f"GRANT SELECT, UPDATE ON pg_eventstream_demo_counter TO {_ROLE}")


def _count_overtaken(after: int) -> int:
    """Count the events that were inserted before an event that precedes them in the stream."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT count(*) FROM (
                SELECT event_id < max(event_id) OVER (ORDER BY eid) AS late
                  FROM pg_eventstream_stream WHERE channel = %s AND eid > %s
            ) AS placed WHERE late
            """,
            [_CHANNEL, after],
        )
        return int(cursor.fetchone()[0])


def _not_increasing(values: list[int]) -> int:
    return sum(later <= earlier for earlier, later in pairwise(values))


def _count_faults(client: Client, sent: dict[Key, Sent]) -> dict[str, int]:
    """Count the errors of each kind in what a client received."""
    mine = [event for event in client.received if event.commits]
    times = Counter((event.sender, event.number) for event in mine)
    return {
        "missing": len(sent.keys() - times.keys()),
        "duplicated": sum(count - 1 for count in times.values()),
        "id is not the next number": sum(b != a + 1 for a, b in pairwise(client.eids)),
        "out of its sender's order": sum(
            _not_increasing([event.number for event in mine if event.sender == sender])
            for sender in {sender for sender, _ in sent}
        ),
        "out of commit order": _not_increasing(
            [
                sent[event.sender, event.number].order
                for event in mine
                if (event.sender, event.number) in sent
            ]
        ),
        "rolled back but received": sum(not event.commits for event in client.received),
        "unknown": len(times.keys() - sent.keys()),
        "stream-reset": client.resets,
    }


def _percentile(values: list[float], percent: int) -> str:
    if not values:
        return "-"
    ordered = sorted(values)
    return f"{ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] * 1000:.1f} ms"


def _wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def main() -> int:
    """Run the check and print the table. Returns 0 if nothing is wrong, else 1."""
    django.setup()
    _prepare()
    live = Client("connected")
    away = Client(f"away for {_AWAY_SECONDS:g} s", away_after=_AWAY_AFTER)
    clients = [live, away]
    for client in clients:
        client.start()
    for client in clients:
        if not client.opened.wait(_DEADLINE):
            print(f"FAILED: {settings.URL}/events/ opened no stream: {client.error}")
            return 1
    first_eid = live.eids[0]

    kinds = {"send_event": _send_with_django, "psql": _send_with_psql}
    total = len(kinds) * _SENDERS * _COMMITTED
    print(
        f"  Sending from {len(kinds) * _SENDERS} connections, half of them psql as a role that"
        " may only INSERT …",
        flush=True,
    )
    begin = time.monotonic()
    with ThreadPoolExecutor(len(kinds) * _SENDERS) as pool:
        parts = [
            pool.submit(send, f"{name} {nth}")
            for name, send in kinds.items()
            for nth in range(1, _SENDERS + 1)
        ]
        sent = {key: value for part in parts for key, value in part.result(_DEADLINE).items()}
    seconds = time.monotonic() - begin
    print(f"  Committed {len(sent)} events in {seconds:.1f} s. Receiving …", flush=True)
    _wait_for(lambda: all(len(client.received) >= len(sent) for client in clients), _DEADLINE)
    time.sleep(_LINGER)

    faults = {client: _count_faults(client, sent) for client in clients}
    rows = [
        ("sent and committed", [str(len(sent))] * 2),
        ("received", [str(len(client.received)) for client in clients]),
        *((fault, [str(faults[client][fault]) for client in clients]) for fault in faults[live]),
    ]
    print(f"\n  {'client':<34}" + "".join(f"{client.name:>16}" for client in clients))
    for name, values in rows:
        print(f"  {name:.<34}" + "".join(f"{value:.>16}" for value in values))
    print(
        f"\n  {len(kinds) * _SENDERS * _ROLLED_BACK} more transactions rolled back."
        f" {_count_overtaken(first_eid)} of the events were inserted"
        "\n  before an event that was committed earlier.\n"
        "\n  Latency from just before COMMIT to the connected client, COMMIT included:"
    )
    for in_burst in (True, False):
        late = [
            event.at - sent[key].at
            for event in live.received
            if (key := (event.sender, event.number)) in sent and sent[key].in_burst == in_burst
        ]
        begin, *_, end = sorted(s.at for s in sent.values() if s.in_burst == in_burst)
        print(
            f"  at {len(late) / (end - begin):4.0f} events/s:"
            f" p50 {_percentile(late, 50)}, p99 {_percentile(late, 99)}"
        )
    if len(sent) != total or any(any(counts.values()) for counts in faults.values()):
        for client in clients:
            if client.error:
                print(f"  Client {client.name}: {client.error}")
        print("\n  FAILED")
        return 1
    way = "through Pushpin" if settings.PROXIED else "without a proxy"
    print(f"\n  Everything arrived once, in commit order, {way}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
