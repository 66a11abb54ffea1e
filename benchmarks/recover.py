"""Resuming streams: how fast clients that were away get the events that they missed.

The log contains 5,000,000 events in 1,000 channels (1,000,000 if quick), equal for pg_eventstream
and for django-eventstream (its DjangoModelStorage) in the same PostgreSQL, vacuumed and analyzed as
autovacuum does after such a load. One uvicorn process serves the endpoint, with either package in
turns.

    resumes     requests like those of a proxy (signed, with a Last-Event-ID 100 events back), 8 at
                a time: responses with all 100 events and a hold, per second
    reconnect   1,000 clients (300 if quick) reconnect through Pushpin at once, each to a different
                channel: seconds until all of them have their 100 events

(Pushpin 1.36 answers 502 to requests that it cannot forward at once. Such a client, and one whose
stream ends early, reconnects after 0.1 s.)

    python -m benchmarks.recover [--quick] [--rounds 3]
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from contextlib import ExitStack
from urllib.parse import quote

import jwt
import psycopg

from pg_eventstream.servers.processes import HOST, free_port

from . import report
from .report import Comparison, Report, at_least, say
from .servers import OURS, PEER, SIG_KEY, Database, postgres, pushpin

CHANNELS = 1000
BEHIND = 100
REQUESTERS = 8

_DATA = """'{"n": ' || n || ', "text": "' || repeat('a line of a chat; ', 5) || '"}'"""
_FILL = {
    OURS: f"""
        SET session_replication_role = replica;
        INSERT INTO pg_eventstream_event (id, channel, data)
        SELECT n, 'c' || n %% %(channels)s, {_DATA}
          FROM generate_series(1, %(events)s) AS n;
        INSERT INTO pg_eventstream_stream (position, channel, eid, event_id)
        SELECT n, 'c' || n %% %(channels)s, (n - 1) / %(channels)s + 1, n
          FROM generate_series(1, %(events)s) AS n;
        SELECT setval('pg_eventstream_event_id_seq', %(events)s);
    """,
    # As it stores them: JSON in a JSON string, and a counter and a placeholder per channel.
    PEER: f"""
        INSERT INTO django_eventstream_eventcounter (name, value, updated)
        SELECT 'c' || n, %(events)s / %(channels)s, now()
          FROM generate_series(0, %(channels)s - 1) AS n;
        INSERT INTO django_eventstream_event (channel, type, data, eid, created)
        SELECT 'c' || n, '', '', 0, now() FROM generate_series(0, %(channels)s - 1) AS n;
        INSERT INTO django_eventstream_event (channel, type, data, eid, created)
        SELECT 'c' || n %% %(channels)s, 'message', to_json({_DATA})::text,
               (n - 1) / %(channels)s + 1, now()
          FROM generate_series(1, %(events)s) AS n;
    """,
}
_ID = re.compile(rb"event: message\nid: c\d+:(\d+)\ndata: [^\n]")


def benchmark(options: report.Options) -> Report:
    events, clients = (1_000_000, 300) if options.quick else (5_000_000, 1000)
    resumes = Comparison("resumes", "resumes/s", OURS, PEER, at_least(3))
    # Both are times, so the peer comes first.
    reconnect = Comparison(f"{clients} clients at once", "s", PEER, OURS, at_least(3))
    found = Report([resumes, reconnect], {"events in the log": events, "VACUUM ANALYZE": "yes"})
    # Under ASGI Django opens a connection per request in progress, which can be all of them.
    with postgres(max_connections="1200", max_wal_size="8GB") as server, ExitStack() as stack:
        grip_url = f"http://{HOST}:1?key={quote(SIG_KEY)}"
        databases = [Database(server, name, name, GRIP_URL=grip_url) for name in (OURS, PEER)]
        ports = {database.name: free_port() for database in databases}
        proxies = {}
        for database in databases:
            began = time.monotonic()
            fill(database, events)
            say("recover", f"{database.name}: filled in {time.monotonic() - began:.0f} s")
            directory = server.directory / f"pushpin-{database.name}"
            proxies[database.name] = stack.enter_context(pushpin(directory, ports[database.name]))
        newest = events // CHANNELS
        refusals: Counter[str] = Counter()
        for n in range(options.rounds):
            for database in databases if n % 2 == 0 else databases[::-1]:
                with database.site(ports[database.name]) as site:
                    asyncio.run(resumes_per_second(site.port, newest, 0.5))
                    rate = asyncio.run(
                        resumes_per_second(site.port, newest, 2 if options.quick else 6)
                    )
                    refusals.clear()
                    seconds = asyncio.run(
                        all_reconnect(proxies[database.name].port, newest, clients, refusals)
                    )
                resumes.add(database.name, rate)
                reconnect.add(database.name, seconds)
                found.facts[f"{database.name}: first refused by Pushpin"] = refusals["502"]
                found.facts[f"{database.name}: cut off before the end"] = refusals["cut"]
                say(
                    "recover",
                    f"round {n + 1}, {database.name}: {rate:.0f} resumes/s,"
                    f" {clients} clients in {seconds:.2f} s",
                )
    return found


def fill(database: Database, events: int) -> None:
    """Fill the tables, without indexes except those of constraints."""
    with database.connect() as connection:
        connection.execute("SET maintenance_work_mem = '256MB'")
        indexes = connection.execute(
            "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index"
            " WHERE indrelid = to_regclass('django_eventstream_event') AND NOT indisunique"
        ).fetchall()
        for name, _ in indexes:
            connection.execute(f"DROP INDEX {name}")
        # Several statements in one query cannot have parameters that the server binds.
        with psycopg.ClientCursor(connection) as cursor:
            cursor.execute(_FILL[database.name], {"events": events, "channels": CHANNELS})
        for _, definition in indexes:
            connection.execute(definition)
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")


def request(version: str, channel: int, newest: int, signature: str = "") -> bytes:
    return (
        f"GET /events/?channel=c{channel} HTTP/{version}\r\nHost: localhost\r\n{signature}"
        f"Last-Event-ID: c{channel}:{newest - BEHIND}\r\n\r\n"
    ).encode()


def assert_complete(body: bytes, newest: int) -> None:
    """Assert that all missed events are there, once and in order."""
    eids = [int(eid) for eid in _ID.findall(body)]
    assert eids == list(range(newest - BEHIND + 1, newest + 1)), body[-2000:]


async def resumes_per_second(port: int, newest: int, seconds: float) -> float:
    token = jwt.encode({"iss": "pushpin", "exp": int(time.time()) + 3600}, SIG_KEY)
    count = 0
    began = time.monotonic()
    end = began + seconds

    async def requester(first: int) -> None:
        nonlocal count
        reader, writer = await asyncio.open_connection(HOST, port)
        channel = first
        while time.monotonic() < end:
            # Stride through the channels, so that no two requesters use the same one.
            channel = (channel + 7 * REQUESTERS) % CHANNELS
            writer.write(request("1.1", channel, newest, f"Grip-Sig: {token}\r\n"))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert b"grip-hold: stream" in head, head
            assert b"transfer-encoding: chunked" in head, head
            assert_complete(await reader.readuntil(b"\r\n0\r\n\r\n"), newest)
            count += 1
        writer.close()

    await asyncio.gather(*(requester(n) for n in range(REQUESTERS)))
    return count / (time.monotonic() - began)


async def _reconnect(channel: int, newest: int, port: int, refusals: Counter[str]) -> None:
    """Reconnect one client. Returns when it has all events that it missed."""
    while True:
        reader, writer = await asyncio.open_connection(HOST, port, limit=1_000_000)
        try:
            # HTTP/1.0, so that the body is not chunked.
            writer.write(request("1.0", channel, newest))
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 502 " not in head.partition(b"\r\n")[0]:
                body = b""
                while len(_ID.findall(body)) < BEHIND or not body.endswith(b"\n\n"):
                    body += await reader.readuntil(b"\n\n")
                assert_complete(body, newest)
                return
            refusals["502"] += 1
        except asyncio.IncompleteReadError:
            refusals["cut"] += 1
        finally:
            writer.transport.abort()
        await asyncio.sleep(random.uniform(0.05, 0.15))


async def all_reconnect(port: int, newest: int, count: int, refusals: Counter[str]) -> float:
    """Seconds from the first connection until the last client has all events that it missed."""
    began = time.monotonic()
    clients = (_reconnect(n % CHANNELS, newest, port, refusals) for n in range(count))
    await asyncio.wait_for(asyncio.gather(*clients), 120)
    return time.monotonic() - began


if __name__ == "__main__":
    report.main("recover", __doc__, benchmark)
