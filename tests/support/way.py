"""The way of events from a database to a client, of which a test can break each part."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from django.core.management import call_command
from django.test import override_settings

from pg_eventstream.channels import DOCTOR
from pg_eventstream.servers.processes import Process, accepts, free_port
from pg_eventstream.servers.pushpin import Pushpin
from tests.support import forked
from tests.support.application import application
from tests.support.database import Database
from tests.support.environment import DIRECTORY, KEY, child_environment
from tests.support.programs import installed
from tests.support.publisher import PublisherProcess


@dataclass
class World:
    """A way of events through a proxy. ``stack`` ends what a single test has started."""

    database: Database
    pushpin: Pushpin
    app_port: int
    app: Process | None = None
    app_settings: dict[str, Any] | None = None
    publisher: PublisherProcess | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    #: Settings of the doctor itself.
    settings: dict[str, Any] = field(default_factory=dict)
    count: int = 0

    def serve(self, kind: str = "asgi", **changed: Any) -> None:
        """Restart the application with these settings, unless it runs with them."""
        wanted = {"kind": kind, **changed}
        if self.app is not None and self.app.running and self.app_settings == wanted:
            return
        self.stop_serving()
        self.app = application(
            self.app_port,
            self.pushpin,
            kind=kind,
            PG_EVENTSTREAM_TEST_SETTINGS=json.dumps(changed),
        )
        self.app_settings = wanted

    def stop_serving(self) -> None:
        if self.app is not None:
            self.app.kill()

    def publish(self, *arguments: str, pushpin: Pushpin | None = None, **environment: str) -> None:
        """Restart the publisher, unless it runs like this."""
        is_default = not (arguments or pushpin or environment)
        running = self.publisher is not None and self.publisher.running
        if is_default and running and self.publisher_is_default:
            return
        self.stop_publishing()
        self.count += 1
        log_path = DIRECTORY / f"doctors-publisher-{self.database.name}-{self.count}.log"
        environment = child_environment(pushpin or self.pushpin, **environment)
        self.publisher = PublisherProcess(log_path, environment, *arguments).lead()
        self.publisher_is_default = is_default

    publisher_is_default = True

    def stop_publishing(self) -> None:
        if self.publisher is not None:
            self.publisher.kill()

    @property
    def url(self) -> str:
        return f"{self.pushpin.url}/events/"

    def nginx(self, *directives: str, to: str = "", http: str = "1.1") -> str:
        """Start nginx in front of the proxy. Returns the URL of the endpoint there."""
        port = free_port()
        directory = DIRECTORY / f"nginx-{port}"
        directory.mkdir()
        directory.chmod(0o777)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{kind}_temp_path {kind}; " for kind in kinds)
        configuration = directory / "nginx.conf"
        configuration.write_text(f"""
            daemon off; pid nginx.pid; error_log stderr;
            events {{}}
            http {{
                access_log off; {temporary} gzip_min_length 1; gzip_types *;
                server {{ listen 127.0.0.1:{port}; location /events/ {{
                    proxy_pass {to or self.pushpin.url};
                    proxy_http_version {http}; proxy_set_header Host $host;
                    {" ".join(directives)}
                }} }}
            }}
        """)
        self.run("nginx", ["nginx", "-p", directory, "-c", configuration], directory, port)
        return f"http://127.0.0.1:{port}/events/"

    def pgbouncer(self) -> str:
        """Start PgBouncer in front of the database. Returns the connection string."""
        port = free_port()
        directory = DIRECTORY / f"pgbouncer-{port}"
        directory.mkdir()
        directory.chmod(0o777)
        configuration = directory / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = host=127.0.0.1 port={self.database.postgres.port} user=postgres\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            "auth_type = any\npool_mode = transaction\n"
            "ignore_startup_parameters = extra_float_digits\n"
        )
        self.run("PgBouncer", [installed("pgbouncer"), configuration], directory, port)
        return f"postgresql://postgres@127.0.0.1:{port}/{self.database.name}"

    def run(self, name: str, command: list[Any], directory: Path, port: int) -> None:
        user = "nobody" if os.geteuid() == 0 else None
        process = Process(name, command, log_path=directory / "log", user=user)
        process.start(ready=lambda: accepts(port))
        self.stack.callback(process.stop)

    def proxy(self, **options: Any) -> Pushpin:
        """Start another proxy in front of the same application."""
        directory = DIRECTORY / f"doctors-{free_port()}"
        options = {"origin": f"127.0.0.1:{self.app_port}", "sig_key": KEY, **options}
        program = os.environ.get("PG_EVENTSTREAM_TEST_PUSHPIN", "pushpin")
        return self.stack.enter_context(Pushpin(directory, program=program, **options))

    def run_doctor(self, *arguments: str, dsn: str = "") -> subprocess.CompletedProcess[str]:
        """Run the command in a separate process."""
        return forked.run(
            [sys.executable, "-m", "django", "eventstream_doctor", *arguments],
            child_environment(self.pushpin, **({"PG_EVENTSTREAM_TEST_DSN": dsn} if dsn else {})),
        )

    def ask_doctor(self, *arguments: str) -> dict[str, Any]:
        output = StringIO()
        status = 0
        grip_url = f"{self.pushpin.control_url}?key={KEY}"
        with override_settings(**{"GRIP_URL": grip_url, **self.settings}):
            try:
                call_command("eventstream_doctor", "--json", *arguments, stdout=output)
            except SystemExit as e:
                status = int(e.code or 0)
        result: dict[str, Any] = json.loads(output.getvalue())
        assert status == {"healthy": 0, "degraded": 1, "broken": 2}[result["verdict"]]
        return result


def begin_probes_anew(database: Database) -> None:
    """Let the ids of probes differ from those of other databases, which the proxy remembers."""
    database.execute(
        "INSERT INTO pg_eventstream_channel (name, pruned) VALUES (%s, %s)",
        [DOCTOR, random.randrange(10**9)],
    )
