"""A process that uses one feature and forks children that use all of them: see test_fork.py."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads

import django  # noqa: E402

django.setup()

from asgiref.sync import sync_to_async  # noqa: E402
from django.db import connections  # noqa: E402

from pg_eventstream import asend_event, get_events, send_event, subscribe  # noqa: E402
from pg_eventstream.errors import NotLeading  # noqa: E402
from pg_eventstream.limits import Limits  # noqa: E402
from pg_eventstream.postgres.connector import Connector  # noqa: E402
from pg_eventstream.postgres.threads import run  # noqa: E402
from pg_eventstream.publisher.daemon import Publisher  # noqa: E402
from pg_eventstream.servers.processes import wait_until  # noqa: E402
from tests.project.asgi import application  # noqa: E402

CHANNEL = sys.argv[1]


async def follow(see: Callable[[str], bool]) -> None:
    """Follow the channel until ``see`` returns true."""
    async for event in subscribe([CHANNEL], "earliest"):
        if see(event.data):
            return


async def stream(see: Callable[[str], bool]) -> None:
    """Do the same as a client of a stream."""
    over = asyncio.Event()
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b""}
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        for line in message.get("body", b"").decode().splitlines():
            if line.startswith("data: ") and see(line.removeprefix("data: ")):
                over.set()

    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
        "path": "/events/", "headers": [], "server": ("127.0.0.1", 1), "client": None,
        "query_string": f"channel={CHANNEL}&lastEventId=earliest".encode(),
    }  # fmt: skip
    await asyncio.wait_for(application(scope, receive, send), None)


def read(see: Callable[[str], bool]) -> None:
    """Read repeatedly, so that a read is always in progress."""
    while not any(see(e.data) for e in run(lambda: get_events([CHANNEL], "earliest")).events):
        pass


def asend(see: Callable[[str], bool]) -> None:
    """Send in the main thread's event loop, before it forks."""
    asyncio.run(asend_event(CHANNEL, "message", "first"))
    asyncio.run(sync_to_async(connections.close_all)())
    asyncio.run(follow(see))


def publish(see: Callable[[str], bool]) -> None:
    """Lead, and report what was sequenced."""
    publisher = Publisher(Connector("default"))
    threading.Thread(target=publisher.run, daemon=True).start()
    read(see)
    publisher.stop()


USES: dict[str, Callable[[Callable[[str], bool]], None]] = {
    "subscribe": lambda see: asyncio.run(follow(see)),
    "stream": lambda see: asyncio.run(stream(see)),
    "read": read,
    "asend": asend,
    "publish": publish,
}


def use_all() -> None:
    """Use each feature in a child, with an old event and a new one."""
    read(lambda data: data == '"first"')
    asyncio.run(asend_event(CHANNEL, "message", "asynchronous"))
    for n, use in enumerate((USES["subscribe"], USES["stream"])):
        use(_live(f"{os.getpid()}-{n}"))
    try:
        Publisher(Connector("default")).run_once()
    except NotLeading:
        assert sys.argv[2] == "publish"
    USES["subscribe"](_live(f"{os.getpid()}-last"))


def _live(text: str) -> Callable[[str], bool]:
    """Send an event after the first was seen, and wait for it."""

    def see(data: str) -> bool:
        if data == '"first"':
            threading.Thread(target=send, args=[text]).start()
        return data == f'"{text}"'

    return see


def send(text: str) -> None:
    send_event(CHANNEL, "message", text)
    connections.close_all()


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a child. Returns its wait status; SIGALRM kills a child that hangs."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            work()
        except BaseException:  # noqa: BLE001
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def sessions() -> set[int]:
    with connections["default"].cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name ~ '^pg_eventstream (leader|bell|hub)'"
        )
        found = {pid for (pid,) in cursor}
    connections.close_all()
    return found


def main() -> None:
    """Use the feature USE, fork, and report whether all went well in all processes."""
    seen: set[str] = set()

    def see(data: str) -> bool:
        seen.add(data)
        return data == '"last"'

    using = threading.Thread(target=USES[sys.argv[2]], args=[see], daemon=True)
    if sys.argv[2] == "read":  # no other process sequences
        send("first")
        asyncio.run(follow(lambda data: data == '"first"'))
        using.start()
    else:
        using.start()
        send("first")
    wait_until(lambda: '"first"' in seen, timeout=60)
    before = sessions()
    statuses = [in_child(use_all) for _ in range(2)]
    assert statuses == [0, 0], statuses
    assert sessions() >= before
    send("last")
    if sys.argv[2] == "read":
        asyncio.run(follow(lambda data: data == '"last"'))
    using.join(60)
    assert '"last"' in seen
    print("all is well", flush=True)  # noqa: T201


def lead_and_fork() -> None:
    """Lead until killed, with a child that does nothing."""
    threading.Thread(target=Publisher(Connector("default")).run, daemon=True).start()
    wait_until(lambda: len(sessions()) == 2, timeout=60)
    if (pid := os.fork()) == 0:
        signal.alarm(120)
        while True:
            signal.pause()
    print(pid, flush=True)  # noqa: T201
    signal.pause()


def stop_a_child() -> None:
    """Fork a child whose server stops in another way than its parent's."""
    send("first")
    asyncio.run(stream(lambda data: True))

    def serve() -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: None)

        def see(data: str) -> bool:
            os.kill(os.getpid(), signal.SIGTERM)
            return False

        asyncio.run(stream(see))

    assert in_child(serve) == 0
    print("all is well", flush=True)  # noqa: T201


def fork_while_a_statement_runs() -> None:
    """Fork during a statement. A child that asked why its parent's session is idle would end it."""
    impatient = Limits(silence=0.3, look=0.1)
    with Connector("default", limits=impatient).connect("parent") as connection:
        running = threading.Thread(target=connection.execute, args=["SELECT pg_sleep(1)"])
        running.start()
        wait_until(lambda: connection._heard_at is not None, timeout=30)

        def look() -> None:
            with Connector("default", limits=impatient).connect("child") as own:
                own.execute("SELECT pg_sleep(3)")

        assert in_child(look) == 0
        running.join()
        connection.execute("SELECT 1")
    print("all is well", flush=True)  # noqa: T201


OTHERS = {
    "lead": lead_and_fork,
    "stop a child": stop_a_child,
    "a statement": fork_while_a_statement_runs,
}

if __name__ == "__main__":
    OTHERS.get(sys.argv[2], main)()
