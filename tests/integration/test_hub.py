"""The cost of an event, a stream and a client that leaves does not depend on other clients."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psycopg
import pytest

from pg_eventstream import channel_permission_changed, send_event, send_events
from pg_eventstream.grip.hints import Hints
from pg_eventstream.grip.items import hint
from pg_eventstream.stream_event import Row, StreamEvent
from pg_eventstream.streams.hub import Hub, _Reader
from tests.support.database import Database
from tests.support.rounds import sequence

FEW, MANY = 10, 2000


class Client:
    """A subscriber of one channel."""

    def __init__(self, channel: str) -> None:
        self.channels = (channel,)
        self.offered: list[Row] = []
        self.again = 0

    def offer(self, row: Row) -> None:
        self.offered.append(row)

    def read_again(self) -> None:
        self.again += 1


class Traffic:
    """The bytes that statements send to the server and receive, as text, and their number."""

    def __init__(self) -> None:
        self.statements = self.sent = self.received = 0


class Recording(psycopg.Cursor[Any]):
    traffic: Traffic

    def execute(self, query: Any, params: Any = None, **options: Any) -> Recording:
        self.traffic.statements += 1
        self.traffic.sent += len(str(query)) + len(str(params))
        super().execute(query, params, **options)
        return self

    def fetchall(self) -> list[Any]:
        rows = super().fetchall()
        self.traffic.received += len(str(rows))
        return rows


class Followed:
    """A hub whose reader the test calls, with clients in a separate event loop."""

    def __init__(self, session: psycopg.Connection[Any]) -> None:
        self.hub = Hub("default")
        self.reader = self.hub._reader = _Reader(self.hub)  # not started
        self.reader.position = 0
        self._session = session
        session.cursor_factory = Recording

    def add(self, *channels: str, reader: str | None = None) -> list[Client]:
        clients = [Client(channel) for channel in channels]
        for client in clients:
            self.hub.add(client, *([reader] if reader is not None else []))
        return clients

    def read(self, position: int = 0) -> Traffic:
        traffic = Recording.traffic = Traffic()
        self.reader.position = position
        while self.reader._read_page(self._session):
            pass
        return traffic


def with_hub(database: Database, work: Callable[[Followed], Any]) -> None:
    async def run() -> None:
        with database.connect() as session:
            work(Followed(session))
        await asyncio.sleep(0)  # the loop processes what it was given

    asyncio.run(run())


def operations(function: Callable[[], Any]) -> int:
    """The number of Python operations it takes, a measure that other load does not affect."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    previous = sys.gettrace()
    # Python 3.12 reports operations only if a frame wanted them before the trace began.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(previous)
    return count


def test_page_costs_the_same_however_many_channels_are_followed(database: Database) -> None:
    send_events([(f"c{n}", "message", n) for n in range(20)])
    sequence(database)
    costs = []

    def measure(followed: Followed) -> None:
        for count in (FEW, MANY):
            followed.add(*(f"c{n}" for n in range(count)))
            followed.read()  # loads everything that is loaded lazily
            traffic = Recording.traffic = Traffic()
            followed.reader.position = 0
            work = operations(lambda: followed.reader._read_page(followed._session))
            # Of the 20 events, 10 are for this hub at first.
            costs.append((traffic.statements, traffic.sent, work))

    with_hub(database, measure)
    (few_statements, few_sent, few_work), (statements, sent, work) = costs
    assert statements == few_statements
    assert sent < few_sent + 200  # the keys of 10 events
    assert work < 3 * few_work


def test_channels_without_followers_are_not_read(database: Database) -> None:
    send_events([("large", "message", "x" * 50_000)] * 30)
    send_events([("small", "message", "y")] * 30)
    sequence(database)
    got: list[Client] = []

    def read(followed: Followed) -> None:
        got.extend(followed.add("small"))
        traffic = followed.read()
        assert traffic.received < 20_000
        assert followed.reader.position == 60

    with_hub(database, read)
    assert [news.data for news in got[0].offered if isinstance(news, StreamEvent)] == ['"y"'] * 30


def test_events_of_every_size_are_offered_in_order(database: Database) -> None:
    texts = ["x" * size for size in (1, 900, 2000, 60_000, 70_000, 5)]
    skipped = [None, None, [], ["7"], None, [str(n) for n in range(1000)]]
    send_events([("a", "t", text, skip, False) for text, skip in zip(texts, skipped, strict=True)])
    sequence(database)
    got: list[Client] = []

    def read(followed: Followed) -> None:
        got.extend(followed.add("a"))
        assert followed.read().statements == 3

    with_hub(database, read)
    news = [news for news in got[0].offered if isinstance(news, StreamEvent)]
    assert [n.number for n in news] == [1, 2, 3, 4, 5, 6]
    # Each client reads the event itself that is too large to be passed to all.
    assert [n.data for n in news] == [*texts[:4], None, texts[5]]
    assert [n.skip_user_ids for n in news] == [skip or [] for skip in skipped]
    assert {n.type for n in news} == {"t"}


def test_pages_without_followed_channels_wake_no_loop(database: Database) -> None:
    send_events([("other", "message", n) for n in range(500)])
    sequence(database)
    calls = []

    def read(followed: Followed) -> None:
        followed.add("mine")
        (group,) = followed.hub._groups.values()
        group.call = lambda *a: calls.append(a)  # type: ignore[method-assign]
        traffic = followed.read()
        assert traffic.statements <= 4  # one per page, and the last one, which finds nothing
        assert followed.reader.position == 500

    with_hub(database, read)
    assert calls == []


def test_client_costs_the_same_however_many_others_there_are(database: Database) -> None:
    """To join and to leave. Otherwise a mass disconnect would be quadratic."""

    def measure(followed: Followed) -> None:
        costs = []
        for count in (FEW, MANY):
            others = followed.add(*(f"c{n}" for n in range(count)))
            client = Client("mine")
            come = operations(lambda client=client: followed.hub.add(client))  # type: ignore[misc]
            leave = operations(lambda client=client: followed.hub.discard(client))  # type: ignore[misc]
            costs.append((come, leave))
            for other in others:
                followed.hub.discard(other)
        assert costs[0] == costs[1]

    with_hub(database, measure)


@pytest.fixture
def closed_loop() -> Callable[[Hub, int], None]:
    def add_and_close(hub: Hub, count: int) -> None:
        async def add() -> None:
            for n in range(count):
                hub.add(Client(f"c{n}"))

        asyncio.run(add())

    return add_and_close


def test_loop_that_is_closed_takes_its_clients_with_it(
    database: Database, closed_loop: Callable[[Hub, int], None]
) -> None:
    with database.connect() as session:
        followed = Followed(session)
        closed_loop(followed.hub, 50)

        async def come() -> None:
            # The same for each client that has left.
            (client,) = followed.add("c1", "mine")[:1]
            assert followed.hub.followed(["c0", "c1", "mine"]) == {"c1", "mine"}
            followed.hub.discard(client)
            assert followed.hub.followed(["c0", "c1", "mine"]) == {"mine"}

        asyncio.run(come())


def test_change_of_permission_is_offered_to_streams_of_that_user_alone(
    database: Database,
) -> None:
    """In a room of thousands, a mass revocation would be quadratic."""
    channel_permission_changed(None, "room")
    sequence(database)
    clients: dict[str, list[Client]] = {}

    def read(followed: Followed) -> None:
        clients["others"] = followed.add(*["room"] * 50, reader="somebody")
        clients["anonymous"] = followed.add("room", "elsewhere", reader="anonymous")
        clients["no reader"] = followed.add("room")
        followed.read()

    with_hub(database, read)
    offered = {who: [len(c.offered) for c in them] for who, them in clients.items()}
    assert offered == {"others": [0] * 50, "anonymous": [1, 0], "no reader": [0]}


def test_client_that_came_while_a_page_was_read_is_not_skipped(database: Database) -> None:
    """It joins later, so it reads the events itself that the hub does not give it."""
    for n in range(3):
        send_event("a", "message", n)
    sequence(database)
    late: list[Client] = []

    def read(followed: Followed) -> None:
        (early,) = followed.add("a")
        late.extend([early, *followed.add("a")])
        followed.read()

    with_hub(database, read)
    assert [len(client.offered) for client in late] == [3, 3]


def test_clients_that_come_after_the_beginning_do_not_read_twice(database: Database) -> None:
    """After a start, a server gets all its clients at once, before the loop does anything else."""
    clients: list[Client] = []

    def begin(followed: Followed) -> None:
        clients.extend(followed.add("a"))
        followed.reader._begin(followed._session)
        assert followed.hub.has_begun
        clients.extend(followed.add("a"))

    with_hub(database, begin)
    assert [client.again for client in clients] == [1, 0]


@contextmanager
def pending(count: int) -> Iterator[Hints]:
    hints = Hints()
    for n in range(count):
        hints.follow(hint(f"c{n}"), 1.0)
    yield hints


def test_hints_that_are_to_come_later_cost_nothing_now() -> None:
    """A mass revocation schedules one for each stream, and each batch asks which are due."""
    costs = []
    for count in (FEW, MANY):
        with pending(count) as hints:
            costs.append(
                (operations(lambda: hints.take_due(1.2)), operations(lambda: hints.next_due()))
            )
            assert hints.next_due() == 1.5
            assert len(hints.take_due(1.5)) == count
            assert len(hints.take_due(6.0)) == count
            assert hints.next_due() is None
    assert costs[0] == costs[1]
