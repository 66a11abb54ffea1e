"""A real PgBouncer in transaction mode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pg_eventstream.servers.processes import Process, accepts, free_port
from tests.support.database import Database
from tests.support.environment import DIRECTORY
from tests.support.programs import installed


@contextmanager
def pgbouncer(database: Database) -> Iterator[str]:
    """Run it in front of the database. Yields a connection string."""
    port = free_port()
    directory = DIRECTORY / f"pgbouncer-{port}"
    directory.mkdir()
    directory.chmod(0o777)
    configuration = directory / "pgbouncer.ini"
    configuration.write_text(
        f"[databases]\n* = host=127.0.0.1 port={database.postgres.port} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        "auth_type = any\npool_mode = transaction\nignore_startup_parameters = extra_float_digits\n"
    )
    process = Process(
        "PgBouncer",
        [installed("pgbouncer"), configuration],
        log_path=directory / "log",
        user="nobody" if os.geteuid() == 0 else None,
    )
    process.start(ready=lambda: accepts(port))
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}/{database.name}"
    finally:
        process.stop()
