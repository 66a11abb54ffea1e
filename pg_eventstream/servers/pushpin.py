"""A real Pushpin on the loopback interface, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from pg_eventstream.servers.processes import (
    HOST,
    Process,
    Server,
    ServerError,
    accepts,
    free_port,
    is_free,
    wait_until,
)

_LONGEST_RUNDIR = 75  # paths of Unix sockets are limited to some 104 bytes, names take up to 29
_PROBE_HOST = "probe.invalid"  # requests to this host test Pushpin and reach no origin


class PushpinNotInstalled(ServerError):
    """Pushpin is not on this machine."""


class Pushpin(Server):
    """A Pushpin that forwards every request to `origin` (host:port).

    It listens on 127.0.0.1 only: for browsers on `port` (`url`), for publishers on
    `control_port` (`control_url`). Requests to the origin carry a Grip-Sig signed with `sig_key`.
    `message_rate` limits deliveries (items times subscribers) per second; 0 means no limit. With
    any limit, versions before 1.40 hold back all deliveries while items arrive less than 25 ms
    apart (src/handler/ratelimiter.cpp: each item restarts the timer).

    Raises PushpinNotInstalled if there is no such program.
    """

    name = "Pushpin"

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
            raise ServerError("Pushpin is already running.")
        ports = (self.port, self.control_port, *self._other_ports)
        # Services that were killed take a moment to release their ports.
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
            orphan_signal=signal.SIGTERM,  # it then ends its services, which are in other groups
        )
        try:
            self._process.start(ready=self._answers)
        except BaseException:
            self._remove_rundir()
            raise

    def stop(self, *, timeout: float = 10) -> None:
        """Stop in order. Processes that still run after `timeout` seconds are killed."""
        if self._process is not None:
            self._process.stop(timeout=timeout)
        self._remove_rundir()

    def kill(self) -> None:
        """Send SIGKILL to all its processes at once."""
        if self._process is not None:
            self._process.kill()
        self._remove_rundir()

    def restart(self) -> None:
        """Stop and start again on the same ports."""
        self.stop()
        self.start()

    def _config(self, rundir: Path) -> str:
        publish, subscribe, command, _ = self._other_ports
        if self.version < (1, 40):
            # Two separate programs handle HTTP. Debian runs the second, zurl, as a system service.
            # This zurl is a private one, with sockets in our directory.
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
        # The services connect to each other asynchronously, and silently lose all that they send
        # before that. So test both paths of a request: to an origin and back, and into a stream
        # that is held.
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
            f"{program} is not installed. On Debian and Ubuntu, run apt-get install pushpin. For"
            " other systems, see https://pushpin.org/docs/install/"
        ) from None
    found = re.search(r"(\d+)\.(\d+)", output.stdout)
    if found is None:
        raise ServerError(f"The output of {program} --version has no version: {output.stdout!r}")
    return int(found[1]), int(found[2])
