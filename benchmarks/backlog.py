"""A backlog of events and its receivers, for the benchmarks that drain one."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import django
import psycopg

from pg_eventstream.servers.processes import HOST

from .streams import Streams

#: Events per transaction of a backlog.
TRANSACTION = 100

INSERT = """
INSERT INTO pg_eventstream_event (channel, data)
SELECT %s, format('{"n": %%s, "text": "%%s"}', n, repeat('a line of a chat, ', 5))
  FROM generate_series(%s::bigint, %s::bigint) AS n
"""


def configure() -> None:
    """Let this process import the library, for measurements in the process itself."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.project.settings"
    django.setup()


def fill(connection: psycopg.Connection[Any], channel: str, count: int) -> None:
    """Commit ``count`` events of about 110 characters, numbered from 1, 100 per transaction."""
    connection.execute("SET synchronous_commit = off")  # only here, where nothing is measured
    for first in range(1, count + 1, TRANSACTION):
        connection.execute(INSERT, [channel, first, min(first + TRANSACTION - 1, count)])
    connection.execute("RESET synchronous_commit")


def empty(connection: psycopg.Connection[Any]) -> None:
    """Remove all events. Positions continue."""
    connection.execute(
        "TRUNCATE pg_eventstream_event, pg_eventstream_outbox, pg_eventstream_stream"
    )


class Receiver:
    """A separate process in which a client reads the stream of one channel."""

    def __init__(self, results: Connection) -> None:
        self._results = results

    def finished(self) -> float:
        """When the last event arrived (`time.monotonic`). Fails if one is missing or misplaced."""
        result = self._results.recv()
        assert isinstance(result, float), result
        return result


@contextmanager
def receiver(port: int, channel: str, count: int) -> Iterator[Receiver]:
    """A client with an open stream that waits for ``count`` events, numbered from 1."""
    context = get_context("spawn")
    results, ours = context.Pipe()
    process = context.Process(target=_receive, args=[ours, port, channel, count], daemon=True)
    process.start()
    try:
        assert results.recv() == "open"
        yield Receiver(results)
    finally:
        process.kill()
        process.join()


def _receive(results: Connection, port: int, channel: str, count: int) -> None:
    async def receive() -> None:
        # HTTP/1.0, because the proxy's chunks would split events.
        async with Streams(port, 1, channel, version="1.0") as streams:
            # A second after a stream is opened, Pushpin asks the origin what was published since
            # then. Wait until it has done so.
            await asyncio.sleep(2)
            streams.expect(count)
            results.send("open")
            await streams.wait(patience=60)
            (stream,) = streams.streams
            numbers = stream.numbers.tolist()
            exact = numbers == list(range(1, count + 1))
            results.send(
                streams.last_time if exact else f"{len(numbers)} of {count} events arrived"
            )

    asyncio.run(receive())


def post(port: int, bodies: list[bytes]) -> None:
    """Post the batches to a Pushpin, one after the other, with as little code as possible."""
    for body in bodies:
        head = (
            f"POST /publish/ HTTP/1.1\r\nHost: {HOST}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((HOST, port)) as connection:
            connection.sendall(head.encode() + body)
            answer = b""
            while part := connection.recv(4096):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200 "), answer


class Stomp:
    """A minimal STOMP broker that counts the messages it gets."""

    def __init__(self) -> None:
        self.received = 0
        self.first_at = self.last_at = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                frame = (await reader.readuntil(b"\x00")).lstrip(b"\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                return
            command, _, rest = frame.partition(b"\n")
            if command in (b"CONNECT", b"STOMP"):
                writer.write(b"CONNECTED\nversion:1.2\n\n\x00")
            elif command == b"SEND":
                self.last_at = time.monotonic()
                self.first_at = self.first_at if self.received else self.last_at
                self.received += 1
            for line in rest.partition(b"\n\n")[0].splitlines():
                name, _, value = line.partition(b":")
                if name == b"receipt":
                    writer.write(b"RECEIPT\nreceipt-id:" + value + b"\n\n\x00")
