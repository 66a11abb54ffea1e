"""Streams without a proxy: any number of processes, and only PostgreSQL."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from django.contrib.auth.models import User
from django.db import transaction

from pg_eventstream import channel_permission_changed, send_event, send_events
from pg_eventstream.postgres.listener import Listener
from pg_eventstream.servers.processes import Process, wait_until
from tests.project.app.models import Membership
from tests.support.application import Serve
from tests.support.database import Database
from tests.support.load import Load
from tests.support.many_clients import ManyClients
from tests.support.origin import log_in
from tests.support.publisher import NewPublisher
from tests.support.rounds import prune, sequence
from tests.support.sse_client import SSEClient


def texts(client: SSEClient) -> list[str]:
    return [event.data for event in client.events]


def received(client: SSEClient, count: int) -> list[str]:
    """The texts of ``count`` events, as soon as they have arrived."""
    return [event.data for event in client.wait_count(count)]


def wait_for_more(client: SSEClient, count: int) -> None:
    seen = len(client.events)
    client.wait_for(lambda: len(client.events) >= seen + count)


def test_server_alone_streams_what_is_committed(database: Database, serve: Serve) -> None:
    url = serve()
    with SSEClient(url, ["a", "b"]) as client, SSEClient(url, ["a"]) as single:
        client.wait_open()
        single.wait_open()
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            send_event("a", "message", "rolled back")
            _ = 1 / 0
        for n in range(20):
            send_event("ab"[n % 2], "message", n)
        client.wait_count(20)
        single.wait_count(10)
        assert texts(client) == [str(n) for n in range(20)]
        assert client.events[-1].eids == {"a": 10, "b": 10}
        assert [event.id for event in single.events] == [f"a:{n}" for n in range(1, 11)]


def test_both_a_publisher_and_servers_at_once_are_safe(
    database: Database, serve: Serve, new_publisher: NewPublisher, channel: str
) -> None:
    load = Load(database, channel, senders=4)
    with SSEClient(serve(), [channel]) as client:
        client.wait_open()
        with load.running():
            for _ in range(3):
                publisher = new_publisher().lead()
                wait_for_more(client, 40)
                publisher.kill()
                wait_for_more(client, 40)  # the server sequences again
        load.check(client)
        assert client.connections == 1


@pytest.mark.faults
@pytest.mark.thorough
def test_four_servers_serve_every_client_everything_once_in_order_despite_database_faults(
    database: Database, serve: Serve, channel: str
) -> None:
    """Other processes send, while backends are terminated and PostgreSQL is restarted."""
    urls = [serve() for _ in range(4)]
    clients = [SSEClient(url, [channel, f"{channel}q"]) for url in urls for _ in range(3)]
    load = Load(database, channel, senders=4)
    for client in clients:
        client.__enter__()
    try:
        for client in clients:
            client.wait_open()
        with load.running():
            for _ in range(5):
                wait_for_more(clients[0], 50)
                database.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'pg_eventstream hub'"
                    " AND datname = current_database()"
                )
        for client in clients:
            load.check(client)
            assert client.connections == 1
    finally:
        for client in clients:
            client.close()


def test_client_that_reconnects_resumes_at_any_server(
    database: Database, serve: Serve, channel: str
) -> None:
    urls = [serve(), serve()]
    load = Load(database, channel, senders=2)
    with SSEClient(urls[0], [channel, "quiet"], reconnect=True) as client:
        client.wait_open()
        with load.running():
            for n in range(20):
                wait_for_more(client, 3)
                client.url = urls[n % 2]
                client.drop()
        load.check(client)
        assert client.connections > 10


def test_missed_events_are_replayed_then_live_ones_follow(
    database: Database, serve: Serve, channel: str
) -> None:
    url = serve()
    sent = [f"{n} {'x' * 300}" for n in range(1500)]
    send_events([(channel, "message", text, None, False) for text in sent])
    for start in ("earliest", f"{channel}:0"):
        with SSEClient(url, [channel], last_event_id=start) as client:
            client.wait_count(len(sent))
            send_event(channel, "message", f"live {start}", json_encode=False)
            sent.append(f"live {start}")
            client.wait_count(len(sent))
            assert texts(client) == sent
    with SSEClient(url, [channel], last_event_id=f"{channel}:{len(sent) - 1}") as client:
        assert received(client, 1) == sent[-1:]


def test_client_begins_no_further_back_than_the_replay_age(
    database: Database, serve: Serve, channel: str
) -> None:
    url = serve(EVENTSTREAM_REPLAY_AGE=600)
    send_events([(channel, "message", n) for n in range(4)])
    sequence(database)
    database.execute(
        "UPDATE pg_eventstream_stream SET sequenced_at = now() - interval '1 h' WHERE eid <= 2"
    )
    with (
        SSEClient(url, [channel], last_event_id="earliest") as earliest,
        SSEClient(url, [channel], last_event_id=f"{channel}:2") as young,
        SSEClient(url, [channel], last_event_id=f"{channel}:1") as old,
    ):
        assert received(earliest, 2) == received(young, 2) == ["2", "3"]
        old.wait_for(lambda: len(old.control) == 2)
        assert (old.control[1].type, old.control[1].eids) == ("stream-reset", {channel: 4})
        assert old.events == []


def test_stream_reset_carries_the_id_to_continue_from(
    database: Database, serve: Serve, channel: str
) -> None:
    send_events([(channel, "message", n) for n in range(3)])
    sequence(database)
    prune()
    with SSEClient(serve(), [channel], last_event_id=f"{channel}:1") as client:
        client.wait_for(lambda: len(client.control) == 2)
        reset = client.control[1]
        assert (reset.type, json.loads(reset.data)) == ("stream-reset", {"channels": [channel]})
        assert reset.eids == {channel: 3}
        send_event(channel, "message", "next")
        assert client.wait_count(1)[0].eids == {channel: 4}


ODD_TEXTS = ["", "100 % %I %(x)s", "two\nlines\r\nthree", "ü 🎉 ключ \u2028", "x" * 70_000]


def test_texts_and_names_arrive_unchanged_large_ones_too(database: Database, serve: Serve) -> None:
    names = ["a b,c:d%20", "ключ"]
    with SSEClient(serve(), names) as client:
        client.wait_open()
        sent = [*ODD_TEXTS, "y" * 5_000_000, "after"]
        for text in sent:
            for name in names:
                send_event(name, "typ é", text, json_encode=False)
        client.wait_count(2 * len(sent))
        assert texts(client)[::2] == [text.replace("\r\n", "\n") for text in sent]
        assert client.events[-1].eids == dict.fromkeys(names, len(sent))
        assert client.connections == 1


def test_skipped_users_get_the_event_neither_live_nor_replayed(
    database: Database, serve: Serve, channel: str
) -> None:
    url = serve()
    ann, cookie = log_in("ann")
    headers = {"Cookie": cookie}
    with SSEClient(url, [channel], headers=headers) as client, SSEClient(url, [channel]) as other:
        client.wait_open()
        other.wait_open()
        send_event(channel, "message", 1, skip_user_ids=[ann.pk])
        send_event(channel, "message", 2, skip_user_ids=["anonymous"])
        send_event(channel, "message", 3)
        assert received(client, 2) == ["2", "3"]
        assert received(other, 2) == ["1", "3"]
        assert client.events[-1].eids == {channel: 3}
    with SSEClient(url, [channel], headers=headers, last_event_id=f"{channel}:0") as again:
        assert received(again, 2) == ["2", "3"]


def test_unreliable_events_have_no_id_and_disturb_nothing(
    database: Database, serve: Serve, channel: str
) -> None:
    url = serve(EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.Volatile")
    volatile = f"volatile{channel}"
    with SSEClient(url, [channel, volatile]) as client, SSEClient(url, [volatile]) as alone:
        client.wait_open()
        assert alone.wait_open().control[0].id == ""
        for n in range(10):
            send_event(volatile, "message", f"v{n}")
            send_event(channel, "message", f"r{n}")
        client.wait_count(20)
        alone.wait_count(10)
        assert texts(client) == [f'"{kind}{n}"' for n in range(10) for kind in "vr"]
        assert client.last_event_id == f"{channel}:10"
        assert {event.id for event in alone.events} == {""}


MEMBERS: dict[str, Any] = {
    "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channelmanagers.Members"
}


def join(user: User | None, channel: str) -> None:
    Membership.objects.create(user_id=None if user is None else user.pk, channel=channel)


def leave(user: User, channel: str) -> None:
    with transaction.atomic():
        Membership.objects.filter(user_id=user.pk, channel=channel).delete()
        channel_permission_changed(user, channel)


def assert_ended(client: SSEClient, channel: str) -> None:
    assert client.ended.wait(10)
    error = client.control[-1]
    assert (error.type, error.id) == ("stream-error", "error")
    assert json.loads(error.data)["channels"] == [channel]


def test_revocation_ends_that_users_streams_at_every_server_and_nothing_gets_through(
    database: Database, serve: Serve
) -> None:
    urls = [serve(**MEMBERS), serve(**MEMBERS)]
    room = "a b,ключ"
    ann, cookie = log_in("ann")
    bob, bob_cookie = log_in("bob")
    join(bob, room)
    witness = SSEClient(urls[0], [room], headers={"Cookie": bob_cookie})
    with witness:
        witness.wait_open()
        for n in range(5):
            join(ann, room)
            clients = [SSEClient(url, [room, "public"], headers={"Cookie": cookie}) for url in urls]
            for client in clients:
                client.__enter__()
            for client in clients:
                client.wait_open()
            send_event(room, "message", f"before {n}")
            leave(ann, room)
            for _ in range(10):
                send_event(room, "message", "secret")
            for client in clients:
                assert_ended(client, room)
                assert texts(client) in ([], [f'"before {n}"'])
                client.close()
            # Events that are sequenced by then are old for a stream that is opened later.
            assert len(received(witness, 11 * (n + 1))) == 11 * (n + 1)
    with SSEClient(urls[0], [room], headers={"Cookie": cookie}) as refused:
        assert refused.ended.wait(10)


def test_permission_is_asked_again_after_a_while(database: Database, serve: Serve) -> None:
    url = serve(**MEMBERS, EVENTSTREAM_NEXT_LINK_TIMEOUT=1)
    ann, cookie = log_in("ann")
    join(ann, "room")
    with SSEClient(url, ["room"], headers={"Cookie": cookie}) as client:
        client.wait_open()
        Membership.objects.all().delete()
        assert_ended(client, "room")


def test_permission_that_cannot_be_asked_for_just_now_ends_no_stream(
    database: Database, serve: Serve
) -> None:
    """The table that the manager reads is missing when permission is to be checked again."""
    url = serve(**MEMBERS, EVENTSTREAM_NEXT_LINK_TIMEOUT=1)
    ann, cookie = log_in("ann")
    join(ann, "room")
    with SSEClient(url, ["room"], headers={"Cookie": cookie}) as client:
        client.wait_open()
        (server,) = serve.servers
        database.execute("ALTER TABLE app_membership RENAME TO away")
        channel_permission_changed(ann, "room")
        send_event("room", "message", "waits")
        log = server.log_path
        assert log is not None
        wait_until(lambda: "trying again" in log.read_text(), timeout=20)
        assert client.events == []
        database.execute("ALTER TABLE away RENAME TO app_membership")
        assert received(client, 1) == ['"waits"']
        assert client.connections == 1


def test_streams_stay_open_while_postgresql_restarts_and_miss_nothing(
    database: Database, serve: Serve, channel: str
) -> None:
    urls = [serve(), serve()]
    stopping = threading.Event()

    def send() -> None:
        """Continue after each error. The database tells what was committed."""
        for n in range(1_000_000):
            with suppress(psycopg.OperationalError), database.connect() as connection:
                while not stopping.wait(0.005):
                    connection.execute(
                        "INSERT INTO pg_eventstream_event (channel, data) VALUES (%s, %s)",
                        [channel, f"{n}"],
                    )
            if stopping.wait(0.05):
                return

    senders = [threading.Thread(target=send) for _ in range(2)]
    clients = [SSEClient(url, [channel]) for url in urls]
    with clients[0], clients[1]:
        for client in clients:
            client.wait_open()
        for sender in senders:
            sender.start()
        try:
            for mode in ("fast", "immediate"):
                wait_for_more(clients[0], 30)
                database.postgres.stop(mode)
                database.postgres.start()
            wait_for_more(clients[0], 30)
        finally:
            stopping.set()
            for sender in senders:
                sender.join()
        sequence(database)
        total = database.value("SELECT count(*) FROM pg_eventstream_stream")
        for client in clients:
            assert len(received(client, total)) == total
            assert [event.eids[channel] for event in client.events] == [*range(1, total + 1)]
            assert client.connections == 1


# Many clients, and slow ones


@pytest.mark.faults
@pytest.mark.thorough
def test_a_thousand_streams_hold_no_connections_and_get_everything(
    database: Database, serve: Serve, channel: str
) -> None:
    url = serve()
    (server,) = serve.servers

    def connections() -> int:
        count = database.value(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert isinstance(count, int)
        return count

    def threads() -> int:
        return len(list(Path(f"/proc/{server.pid}/task").iterdir()))

    async def follow() -> None:
        async with ManyClients(url, channel) as clients:
            await clients.open(10)
            wait_until(lambda: connections() == 1, timeout=20)
            threads_of_ten, memory = threads(), server_memory(server)
            await clients.open(990)
            wait_until(lambda: connections() == 1, timeout=20)
            assert threads() <= threads_of_ten + 8
            print(f"{(server_memory(server) - memory) / 990:.0f} kB a stream")  # noqa: T201
            for n in range(100):
                await asyncio.to_thread(database.send, channel, str(n))
            await clients.wait_count(100)
            expected = [(f"{channel}:{n + 1}", str(n)) for n in range(100)]
            assert all(got == expected for got in clients.received)
            assert connections() == 1
        wait_until(lambda: connections() == 0, timeout=20)

    asyncio.run(follow())


@pytest.mark.faults
@pytest.mark.thorough
def test_client_that_stops_reading_delays_no_other_and_gets_everything_when_it_reads_again(
    database: Database, serve: Serve, channel: str
) -> None:
    url = serve()
    (server,) = serve.servers
    padding = "x" * 50_000
    with SSEClient(url, [channel]) as client:
        client.wait_open()
        slow = socket.create_connection(("127.0.0.1", urlsplit(url).port))
        slow.sendall(f"GET /events/?channel={channel} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert b"stream-open" in read_until(slow, b"stream-open")
        memory = server_memory(server)
        for n in range(1200):  # 60 MB
            send_event(channel, "message", f"{n} {padding}", json_encode=False)
        client.wait_count(1200)
        assert server_memory(server) < memory + 40_000
        rest = read_until(slow, b"data: 1199 ")
        slow.close()
    got = [int(n) for n in re.findall(rb"data: (\d+) x", rest)]
    assert got == list(range(1200))


def server_memory(server: Process) -> int:
    """The memory of the server in kB."""
    text = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0])


def read_until(sock: socket.socket, text: bytes) -> bytes:
    sock.settimeout(60)
    got = bytearray()
    while text not in got[-200_000:]:
        piece = sock.recv(65536)
        assert piece, got[-1000:]
        got += piece
    return bytes(got)


def test_waking_a_listener_that_is_closed_writes_into_no_other_file(database: Database) -> None:
    """The descriptor of its pipe can belong to a connection by then."""
    with database.connect() as connection:
        for _ in range(20):
            listener = Listener(connection, "a_channel")
            listener.close()
            pairs = [socket.socketpair() for _ in range(4)]
            listener.wake()
            ends = [end for pair in pairs for end in pair]
            for end in ends:
                end.setblocking(False)
                with pytest.raises(BlockingIOError):
                    end.recv(1)
            for end in ends:
                end.close()


def test_client_that_reuses_its_connection_does_not_delay_the_end_of_the_server(
    database: Database, serve: Serve, channel: str
) -> None:
    """Reconnect at once, as browsers do, before the server closes the connection."""
    link = http.client.HTTPConnection(urlsplit(serve()).netloc, timeout=10)
    (server,) = serve.servers
    with closing(link):
        link.request("GET", f"/events/?channel={channel}")
        with link.getresponse() as response:
            while response.readline() != b"event: stream-open\n":
                pass
            os.kill(server.pid, signal.SIGTERM)
            response.read()
        with suppress(OSError, http.client.HTTPException):  # closed already
            link.request("GET", f"/events/?channel={channel}")
            with link.getresponse() as response:
                response.read()
        server.wait(timeout=10)
