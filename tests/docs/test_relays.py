"""The relays of the guide, with real workers, brokers and receivers, and processes that die."""

from __future__ import annotations

import hashlib
import hmac
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pg_eventstream.servers.processes import Process, accepts, free_port, wait_until
from tests.support.database import Database
from tests.support.documentation import Example, example
from tests.support.forked import ForkedProcess
from tests.support.programs import installed
from tests.support.projects import Project
from tests.support.reader import add, migrate

#: Kills the process that runs a consumer once: the handler has returned, and nothing is committed.
KILL = """
import os, pathlib, signal
from pg_eventstream.consumers import handling

def check(alias, connection, _check=handling.check_transaction):
    _check(alias, connection)
    try:
        pathlib.Path(os.environ["PROJECT"], "kill").unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)

handling.check_transaction = check
"""


class Relay:
    """A project with one of the relays, which runs."""

    def __init__(self, project: Project, database: Database) -> None:
        self.project, self.database = project, database
        self.process: Process | None = None

    def start(self, one: Example, name: str, settings: str = "", models: str = "") -> None:
        self.name = name
        self.project.write("myproject/settings.py", settings)
        self.project.write("shop/models.py", models)
        self.project.write("shop/event_consumers.py", KILL)
        add(self.project, one)
        migrate(self.project)
        self.process = ForkedProcess(
            "consumers",
            [sys.executable, "-m", "django", "eventstream_consumers", "run", name],
            log_path=self.log_path,
            environment=self.project.environment,
            directory=self.project.directory,
        )
        self.process.start(ready=lambda: ": running" in self.log)

    @property
    def log_path(self) -> Path:
        return self.project.directory / "consumers.log"

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def kill_next(self) -> None:
        (self.project.directory / "kill").touch()

    def was_killed(self) -> bool:
        return "ended with status -9" in self.log

    def send(self, order: int) -> None:
        self.database.execute(
            "INSERT INTO pg_eventstream_event (channel, type, data)"
            " VALUES ('orders', 'paid', format('{\"order\": %%s}', %s::int))",
            [order],
        )

    def wait(self, condition: Callable[[], bool]) -> None:
        try:
            wait_until(condition, timeout=60)
        except TimeoutError:
            raise AssertionError(self.log) from None


@pytest.fixture
def relay(project: Project, database: Database) -> Iterator[Relay]:
    made = Relay(project, database)
    yield made
    if made.process is not None:
        made.process.stop()


@contextmanager
def redis_server(directory: Path, port: int) -> Iterator[Process]:
    process = Process(
        "Redis",
        [installed("redis-server"), "--port", str(port), "--save", "", "--dir", str(directory)],
        log_path=directory / "redis.log",
    )
    process.start(ready=lambda: accepts(port))
    try:
        yield process
    finally:
        process.kill()


def test_task_is_enqueued_exactly_once(relay: Relay) -> None:
    mails = relay.project.directory / "mails"
    relay.start(
        example("docs/how-to/relays.md", "send_receipt.enqueue"),
        "receipts",
        "\nINSTALLED_APPS += ['django_tasks_db']\n"
        "TASKS = {'default': {'BACKEND': 'django_tasks_db.DatabaseBackend'}}\n"
        "EMAIL_BACKEND = 'django.core.mail.backends.filebased.EmailBackend'\n"
        f"EMAIL_FILE_PATH = {str(mails)!r}\n",
    )
    relay.kill_next()
    relay.send(1)
    relay.wait(relay.was_killed)
    relay.send(2)
    tasks = (
        "SELECT args_kwargs #>> '{kwargs,order}' FROM django_tasks_database_dbtaskresult ORDER BY 1"
    )
    relay.wait(lambda: len(relay.database.fetch(tasks)) >= 2)
    assert relay.database.fetch(tasks) == [("1",), ("2",)]
    relay.project.run(sys.executable, "-m", "django", "db_worker", "--batch")
    texts = [mail.read_text() for mail in mails.iterdir()]
    assert sorted(text.partition("Subject: ")[2].splitlines()[0] for text in texts) == [
        "Order 1 is paid",
        "Order 2 is paid",
    ]


@pytest.mark.faults
@pytest.mark.thorough
def test_celery_task_takes_effect_once(relay: Relay, tmp_path: Path) -> None:
    port = free_port()
    relay.project.write(
        "shop/__init__.py",
        "from celery import Celery\n"
        f"app = Celery('shop', broker='redis://127.0.0.1:{port}/0')\n"
        "app.conf.update(imports=['shop.event_consumers'], broker_connection_retry=True)\n"
        "app.set_default()\n",
    )
    worker = Process(
        "Celery",
        [
            *(sys.executable, "-c"),
            "import django; django.setup()\nfrom shop import app\n"
            "app.worker_main(['worker', '--concurrency=1', '--pool=solo', '--loglevel=INFO'])",
        ],
        log_path=tmp_path / "celery.log",
        environment=relay.project.environment,
        directory=relay.project.directory,
    )
    invoices = 'SELECT event, "order" FROM shop_invoice ORDER BY id'

    def received(text: str) -> int:
        return (tmp_path / "celery.log").read_text().count(f"{text}] received")

    try:
        with redis_server(tmp_path, port) as redis:
            relay.start(
                example("docs/how-to/relays.md", "apply_async"),
                "invoices",
                models="\nclass Invoice(models.Model):\n"
                "    event = models.CharField(max_length=300, unique=True)\n"
                "    order = models.IntegerField()\n",
            )
            worker.start()
            relay.kill_next()
            relay.send(1)
            relay.wait(lambda: received("[orders:1") == 2)
            relay.wait(lambda: len(relay.database.fetch(invoices)) >= 1)
            redis.kill()
            relay.send(2)
            relay.wait(lambda: "event orders:2: attempt 1 of 5 failed" in relay.log)
            relay.send(3)
        with redis_server(tmp_path, port):
            relay.wait(lambda: len(relay.database.fetch(invoices)) >= 3)
    finally:
        worker.kill()
    assert relay.database.fetch(invoices) == [(f"orders:{n}", n) for n in (1, 2, 3)]


class Receiver(ThreadingHTTPServer):
    """Verifies the requests and answers with the next of the given statuses, and then 200."""

    def __init__(self, statuses: list[int]) -> None:
        self.statuses = statuses
        self.requests: list[tuple[str, bytes, int]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                name, moment = self.headers["Webhook-Id"], self.headers["Webhook-Timestamp"]
                expected = hmac.new(b"secret", f"{name}.{moment}.".encode() + body, hashlib.sha256)
                genuine = hmac.compare_digest(
                    expected.hexdigest(), self.headers["Webhook-Signature"]
                )
                recent = abs(time.time() - int(moment)) < 60
                status = 200
                if not (genuine and recent):
                    status = 400
                elif receiver.statuses:
                    status = receiver.statuses.pop(0)
                receiver.requests.append((name, body, status))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook"


def test_webhook_is_signed_and_retried(relay: Relay) -> None:
    receiver = Receiver([200, 200, 503, 302, 200, 410])
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    one = example("docs/how-to/relays.md", "Webhook-Signature")
    quick = Example(one.language, one.code.replace("backoff=5", "backoff=0.1"))
    relay.start(quick, "webhook", f"\nWEBHOOK_URL = {receiver.url!r}\nWEBHOOK_SECRET = 'secret'\n")
    relay.kill_next()
    relay.send(1)
    relay.wait(relay.was_killed)
    for order in (2, 3, 4):
        relay.send(order)
    relay.wait(lambda: [r for r in receiver.requests if r[0] == "orders:4"] != [])
    receiver.shutdown()
    receiver.server_close()
    assert [(name, status) for name, _, status in receiver.requests] == [
        ("orders:1", 200),
        ("orders:1", 200),  # again, with the same id, because its process was killed
        ("orders:2", 503),
        ("orders:2", 302),
        ("orders:2", 200),
        ("orders:3", 410),
        ("orders:4", 200),
    ]
    parked = "SELECT channel, number, attempts FROM pg_eventstream_parked"
    assert relay.database.fetch(parked) == [("orders", 3, 1)]


def test_redis_stream_has_each_event_once(relay: Relay, tmp_path: Path) -> None:
    import redis

    port = free_port()
    with redis_server(tmp_path, port):
        relay.start(
            example("docs/how-to/relays.md", "client.xadd"),
            "redis",
            f"\nREDIS_URL = 'redis://127.0.0.1:{port}/0'\n",
        )
        client: Any = redis.Redis(port=port)
        relay.kill_next()
        relay.send(1)
        relay.wait(relay.was_killed)
        assert client.xlen("events:orders") == 1
        relay.send(2)
        relay.wait(lambda: client.xlen("events:orders") >= 2)
        entries = client.xrange("events:orders")
        client.close()
    assert [(name, fields[b"id"], fields[b"data"]) for name, fields in entries] == [
        (b"1-1", b"orders:1", b'{"order": 1}'),
        (b"2-1", b"orders:2", b'{"order": 2}'),
    ]
