"""How fast a backlog is published: events per second, sequenced and published to Pushpin.

Some hundred thousand events are committed while no publisher runs. Then it starts. The time is
measured from when it leads until a client has the last event. Compared, in turns, with the same
Pushpin:

    publisher   manage.py eventstream_publisher: sequences, reads, encodes, publishes
    bare loop   the same bodies, prepared in memory, sent over a bare socket

without a subscriber (except one that waits for a single event after all others), and with a
subscriber, which must get every event once and in order.

Also measured: sequencing alone, and the relay of django-outbox-pattern, `manage.py publish`, with
a broker that only counts, from its first message to its last, without its COMMIT.

    python -m benchmarks.drain [--quick] [--rounds 3]
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pg_eventstream.servers.processes import free_port, wait_until
from pg_eventstream.servers.pushpin import Pushpin

from . import report
from .backlog import Stomp, configure, empty, fill, post, receiver
from .report import Comparison, Report, at_least, say
from .servers import SIG_KEY, Database, postgres, pushpin

OURS, BARE, PEER = "publisher", "bare loop", "django_outbox_pattern"
SEQUENCE_GOAL = 100_000

_turns = itertools.count(1)


class Drain:
    """Publishes one backlog after another, each on a channel that is new to the proxy."""

    def __init__(self, database: Database, proxy: Pushpin, events: int) -> None:
        self._database, self._proxy, self._events = database, proxy, events

    def rate(self, way: str, subscribed: bool) -> float:
        """Events per second."""
        turn = next(_turns)
        backlog = f"backlog-{turn}"
        with self._database.connect() as connection:
            empty(connection)
            fill(connection, backlog, self._events)
            fill(connection, f"end-{turn}", 1)
        awaited = (backlog, self._events) if subscribed else (f"end-{turn}", 1)
        # The stream is open before anything is sequenced, so that the client gets all events.
        with receiver(self._proxy.port, *awaited) as client:
            if way == BARE:
                bodies = self._bodies()
                start = time.monotonic()
                post(self._proxy.control_port, bodies)
                end = client.finished()
            else:
                with self._database.publisher():
                    end = client.finished()
                clocks = time.time() - time.monotonic()
                start = self._led_since() - clocks
        return self._events / (end - start)

    def sequence_rate(self) -> float:
        with self._database.connect() as connection:
            empty(connection)
            fill(connection, f"backlog-{next(_turns)}", self._events)
            start = time.monotonic()
            sequenced = 0
            while row := connection.execute("SELECT pg_eventstream_sequence()").fetchone():
                if not row[0]:
                    break
                sequenced += row[0]
            seconds = time.monotonic() - start
        assert sequenced == self._events
        return self._events / seconds

    def _bodies(self) -> list[bytes]:
        """The request bodies that the publisher would post."""
        from pg_eventstream.grip import items
        from pg_eventstream.stream_event import decode

        with self._database.connect() as connection:
            while connection.execute("SELECT pg_eventstream_sequence()").fetchone() != (0,):
                pass
            rows = connection.execute(
                "SELECT position, s.channel, eid, prev, type, data, skip_user_ids"
                "  FROM pg_eventstream_stream AS s JOIN pg_eventstream_event AS e"
                "    ON e.id = s.event_id ORDER BY position"
            )
            return [batch.body for batch in items.batches(decode(*row) for row in rows)]

    def _led_since(self) -> float:
        since = self._database.value(
            "SELECT extract(epoch FROM leading_since)::float8 FROM pg_eventstream_publisher"
        )
        assert isinstance(since, float)
        return since


def peer_rate(database: Database, stomp: Stomp, events: int) -> float:
    with database.connect() as connection:
        connection.execute("TRUNCATE published")
        connection.execute(
            """
            INSERT INTO published
                   (id, destination, body, added, expires_at, retry, status, headers)
            SELECT gen_random_uuid(), 'room',
                   jsonb_build_object('n', n, 'text', repeat('a line of a chat, ', 5)),
                   now(), now() + interval '1 day', 0, 1, '{}'
              FROM generate_series(1, %s) AS n
            """,
            [events],
        )
    stomp.received = 0
    relay = database.process("relay", "-m", "django", "publish")
    relay.start()
    try:
        wait_until(lambda: stomp.received >= events or not relay.running, timeout=120)
        assert stomp.received == events, relay.error("did not send everything")
    finally:
        relay.kill()
    return (events - 1) / (stomp.last_at - stomp.first_at)


@contextmanager
def stomp_server(port: int) -> Iterator[Stomp]:
    """Serve in a thread of this process, which does nothing else at the same time."""
    stomp, loop = Stomp(), asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(stomp.serve, "127.0.0.1", port))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield stomp
    finally:
        server.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def benchmark(options: report.Options) -> Report:
    events = 30_000 if options.quick else 200_000
    configure()
    none, one = (
        Comparison(f"{events} events, {who}", "events/s", OURS, BARE, at_least(0.8))
        for who in ("no subscriber", "1 subscriber")
    )
    peer = Comparison("a relay for Django", "events/s", OURS, PEER)
    alone = Comparison("sequencing alone", "events/s", "sequence", "the goal", at_least(1))
    site_port, stomp_port = free_port(), free_port()
    with (
        postgres() as server,
        pushpin(server.directory / "pushpin", site_port) as proxy,
        stomp_server(stomp_port) as stomp,
    ):
        ours = Database(server, "ours", GRIP_URL=f"{proxy.control_url}?key={SIG_KEY}")
        outbox = Database(
            server,
            "outbox",
            PEER,
            ROOT_URLCONF="django.contrib.auth.urls",  # it needs one, but uses none of its URLs
            DJANGO_OUTBOX_PATTERN={"DEFAULT_STOMP_HOST_AND_PORTS": [["127.0.0.1", stomp_port]]},
        )
        drain = Drain(ours, proxy, events)
        with ours.site(site_port):
            for n in range(options.rounds):
                for way in (OURS, BARE) if n % 2 else (BARE, OURS):
                    for comparison in (none, one):
                        rate = drain.rate(way, subscribed=comparison is one)
                        comparison.add(way, rate)
                        say("drain", f"{comparison.what}, {way}: {rate:,.0f} events/s")
                peer.add(OURS, none.rounds[OURS][-1])
                peer.add(PEER, peer_rate(outbox, stomp, 1000 if options.quick else 5000))
                alone.add("sequence", drain.sequence_rate())
                alone.add("the goal", SEQUENCE_GOAL)
    return Report([none, one, alone, peer])


if __name__ == "__main__":
    report.main("drain", __doc__, benchmark)
