"""Runs the demo: `python -m pg_eventstream.demo [--proxy pushpin] [--check] [--directory DIR]`.

Starts PostgreSQL and an application server. The application streams directly, or through Pushpin,
which is fed by the publisher. All servers are private to the demo, listen on the loopback
interface, and stop with it. This process only supervises them.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg

from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import HOST, Process, ServerError, accepts, free_port, is_free
from pg_eventstream.servers.pushpin import Pushpin, PushpinNotInstalled

_DATABASE = "demo"
# Browsers always use "http". "control" and "application" are only used with a proxy.
_PORTS = ("postgres", "http", "control", "application")
_CHECK_SECONDS = 120


def main() -> int:
    arguments = _parse_arguments()
    # Both signals raise KeyboardInterrupt.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with ExitStack() as stack:  # stops everything, in reverse order
            try:
                demo = Demo(arguments.directory.absolute(), stack)
                return demo.run(proxied=arguments.proxy is not None, check=arguments.check)
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)  # shutdown is not interrupted
    except KeyboardInterrupt:
        print("\nStopped.")
        return 1 if arguments.check else 0
    except PushpinNotInstalled as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except (ServerError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


class Demo:
    """The processes of the demo. Before each one starts, `stack` learns how to stop it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self._processes: list[Process] = []
        self._environment = dict(os.environ)

    def run(self, *, proxied: bool, check: bool) -> int:
        """Start all servers, then run the check or wait for a signal."""
        way = "through Pushpin" if proxied else "without a proxy"
        print(f"pg_eventstream demo {way}, in {self._directory}\n")
        self._lock()
        kept = _kept_from_last_run(self._directory / "kept.json")
        url = f"http://{HOST}:{kept['http']}"
        if proxied:
            pushpin = self._start_pushpin(kept)
            self._environment["DEMO_GRIP_URL"] = f"{pushpin.control_url}?key={kept['key']}"
        postgres = self._start_postgres(kept)
        self._environment |= {
            "PYTHONUNBUFFERED": "1",
            "DJANGO_SETTINGS_MODULE": "pg_eventstream.demo.settings",
            "DEMO_SECRET_KEY": kept["secret"],
            "DEMO_DSN": postgres.dsn(_DATABASE),
            "DEMO_PSQL": str(postgres.program("psql")),
            "DEMO_URL": url,
        }
        self._migrate()
        self._start_application(int(kept["application" if proxied else "http"]))
        if proxied:
            self._start_publisher(postgres)
        if check:
            return self._check()
        print(f"\nOpen {url}/ in a browser. Ctrl-C stops everything.", flush=True)
        self._supervise()
        return 0

    def _lock(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        lock = self._stack.enter_context((self._directory / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServerError(
                f"A demo is already running in {self._directory}. Stop it, or use another"
                " --directory."
            ) from None

    def _start_postgres(self, kept: dict[str, str]) -> Postgres:
        postgres = Postgres(self._directory / "postgres", port=int(kept["postgres"]))
        self._stack.callback(postgres.stop)
        with _step(f"PostgreSQL on port {postgres.port}"):
            postgres.start()
            with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
                if not connection.execute(
                    "SELECT 1 FROM pg_database WHERE datname = %s", [_DATABASE]
                ).fetchone():
                    connection.execute(f"CREATE DATABASE {_DATABASE}")
        self._processes.append(postgres.process)
        return postgres

    def _start_pushpin(self, kept: dict[str, str]) -> Pushpin:
        pushpin = Pushpin(
            self._directory / "pushpin",
            origin=f"{HOST}:{kept['application']}",
            port=int(kept["http"]),
            control_port=int(kept["control"]),
            sig_key=kept["key"],
        )
        self._stack.callback(pushpin.stop)
        with _step(f"Pushpin {'.'.join(map(str, pushpin.version))} on port {pushpin.port}"):
            pushpin.start()
        self._processes.append(pushpin.process)
        return pushpin

    def _migrate(self) -> None:
        process = self._python("migrate", "-m", "django", "migrate", "--verbosity=1")
        with _step("Migrations"):
            process.start()
            if process.wait(timeout=60) != 0:
                raise process.error("failed")

    def _start_application(self, port: int) -> None:
        process = self._python(
            "application",
            *("-m", "uvicorn", "--factory", "django.core.asgi:get_asgi_application"),
            *("--host", HOST, "--port", str(port), "--lifespan", "off"),
            *("--timeout-graceful-shutdown", "3"),
        )
        with _step(f"Application server on port {port}"):
            process.start(ready=lambda: accepts(port))
        self._processes.append(process)

    def _start_publisher(self, postgres: Postgres) -> None:
        process = self._python("publisher", "-m", "django", "eventstream_publisher")

        def leads() -> bool:
            with psycopg.connect(postgres.dsn(_DATABASE)) as connection:
                leader = connection.execute("SELECT name FROM pg_eventstream_publisher").fetchone()
            return leader is not None and leader[0].endswith(f":{process.pid}")

        with _step("Publisher"):
            process.start(ready=leads)
        self._processes.append(process)

    def _check(self) -> int:
        print(flush=True)
        process = self._python("check", "-m", "pg_eventstream.demo.check", log=False)
        process.start()
        deadline = time.monotonic() + _CHECK_SECONDS
        while process.running:
            if time.monotonic() > deadline:
                raise process.error(f"took longer than {_CHECK_SECONDS} s")
            self._raise_if_one_ended()
            time.sleep(0.1)
        return 0 if process.returncode == 0 else 1

    def _supervise(self) -> None:
        while True:
            self._raise_if_one_ended()
            time.sleep(0.2)

    def _raise_if_one_ended(self) -> None:
        for process in self._processes:
            if not process.running:
                raise process.error("ended unexpectedly")

    def _python(self, name: str, *arguments: str, log: bool = True) -> Process:
        process = Process(
            name,
            [sys.executable, *arguments],
            log_path=self._directory / f"{name}.log" if log else None,
            environment=self._environment,
        )
        self._stack.callback(process.stop)
        return process


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pg_eventstream.demo",
        description="Events from committed transactions to a page in your browser, live.",
    )
    parser.add_argument(
        "--proxy",
        choices=["pushpin"],
        help="stream through this proxy, fed by the publisher (default: the application streams"
        " directly, without proxy and publisher)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="instead of serving the page, send 1000 events and 100 that are rolled back from ten"
        " connections, compare what two clients receive, print a table, and exit with status 1 if"
        " anything is wrong",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(".demo"),
        help="where the servers keep their data and logs (default: %(default)s)",
    )
    return parser.parse_args()


def _kept_from_last_run(path: Path) -> dict[str, str]:
    """Keys and ports of the last run, so that a page that is still open works again."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    for name in ("key", "secret"):
        kept.setdefault(name, secrets.token_urlsafe(32))
    for name in _PORTS:
        if name not in kept or not is_free(int(kept[name])):
            kept[name] = str(free_port())
    path.touch(mode=0o600)
    path.write_text(json.dumps(kept, indent=1))
    return kept


@contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"  {what:.<40} ", end="", flush=True)
    begin = time.monotonic()
    yield
    print(f"{time.monotonic() - begin:4.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
