"""What a publisher costs while nothing happens: processor time, statements, and WAL.

One publisher leads, with one proxy, and sleeps; another stands by. Nothing has been sent for a
while. Processor time is that of the process and of its PostgreSQL backends, as counted by the
kernel. Statements are those in PostgreSQL's log. Both are compared with fixed goals. WAL is that of
the whole server; it is also measured before any publisher runs.

    python -m benchmarks.idle [--quick] [--rounds 3]
"""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pg_eventstream.servers.processes import Process, free_port

from . import report
from .report import Comparison, Report, at_most, say
from .servers import OURS, SIG_KEY, Database, postgres, pushpin

GOAL = "the goal"
#: For this long after the last event, the pruner looks for events that have just become due.
SETTLE_SECONDS, QUICK_SETTLE_SECONDS = 100, 5


@dataclass(frozen=True)
class Usage:
    """The resources used up to a moment, or between two of them."""

    seconds: float
    cpu: float
    statements: int

    def since(self, before: Usage) -> Usage:
        return Usage(
            self.seconds - before.seconds,
            self.cpu - before.cpu,
            self.statements - before.statements,
        )

    @property
    def percent_of_a_core(self) -> float:
        return 100 * self.cpu / self.seconds

    @property
    def statements_in_five_seconds(self) -> float:
        return 5 * self.statements / self.seconds


class Publisher:
    """A running publisher and the resources it has used."""

    def __init__(self, process: Process, database: Database) -> None:
        with database.connect() as connection:
            rows = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'pg_eventstream %%'"
                " AND client_port = ANY(%s)",
                [_local_ports(process.pid)],
            ).fetchall()
        self.backends = [pid for (pid,) in rows]
        self._pid, self._log = process.pid, database.server.log_path

    def usage(self) -> Usage:
        own = re.compile(
            rf"^(?:{'|'.join(map(str, self.backends))}) LOG:  (?:statement|execute \S+):", re.M
        )
        return Usage(
            time.monotonic(),
            sum(map(_cpu_seconds, (self._pid, *self.backends))),
            len(own.findall(self._log.read_text())),
        )


def _cpu_seconds(pid: int) -> float:
    """The processor time of all threads (Linux: Documentation/scheduler/sched-stats.rst)."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def _local_ports(pid: int) -> list[int]:
    """The local ports of the process's TCP connections, which identify its backends."""
    sockets = {
        match[1]
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if (match := re.match(r"socket:\[(\d+)\]", str(link.readlink())))
    }
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return [int(field[1].rpartition(":")[2], 16) for field in fields if field[9] in sockets]


def benchmark(options: report.Options) -> Report:
    cpu = Comparison("idle publisher: processor time", "% of a core", OURS, GOAL, at_most(1))
    statements = Comparison("idle publisher: statements", "in 5 s", OURS, GOAL, at_most(1))
    seconds = 11 if options.quick else 40
    facts: dict[str, float | int | str] = {}
    with ExitStack() as stack:
        server = stack.enter_context(postgres(log_statement="all", log_line_prefix="%p "))
        proxy = stack.enter_context(pushpin(server.directory / "pushpin", free_port()))
        url = f"{proxy.control_url}?key={SIG_KEY}"
        database = Database(server, OURS, GRIP_URL=url)
        with database.connect() as connection:
            connection.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('a', '')")
            connection.execute("CHECKPOINT")
        facts["WAL of the server without a publisher, bytes per minute"] = _wal(database, 10)
        leader = stack.enter_context(database.publisher())
        standby = database.process("standby", "-m", "django", "eventstream_publisher")
        stack.callback(standby.stop)
        log = standby.log_path
        assert log
        standby.start(ready=lambda: "standing by" in log.read_text())
        say("idle", "waiting until it has been idle for a while")
        time.sleep(QUICK_SETTLE_SECONDS if options.quick else SETTLE_SECONDS)
        publishers = Publisher(leader, database), Publisher(standby, database)
        for n in range(options.rounds):
            before = [publisher.usage() for publisher in publishers]
            facts["WAL of the server with publishers, bytes per minute"] = _wal(database, seconds)
            found, other = (
                publisher.usage().since(b) for publisher, b in zip(publishers, before, strict=True)
            )
            cpu.add(OURS, found.percent_of_a_core)
            cpu.add(GOAL, 0.5)
            statements.add(OURS, found.statements_in_five_seconds)
            statements.add(GOAL, 1)
            facts["statements in 5 s of the publisher that stands by"] = round(
                other.statements_in_five_seconds, 2
            )
            facts["processor time of the publisher that stands by, % of a core"] = round(
                other.percent_of_a_core, 3
            )
            say(
                "idle",
                f"round {n + 1}: {found.percent_of_a_core:.3f} % of a core,"
                f" {found.statements} statements in {found.seconds:.1f} s",
            )
    return Report([cpu, statements], facts)


def _wal(database: Database, seconds: float) -> int:
    """Sleep, and return the bytes that the whole server wrote per minute."""
    with database.connect() as connection:
        position = "SELECT pg_current_wal_insert_lsn() - '0/0'"
        (before,) = connection.execute(position).fetchone() or (0,)
        time.sleep(seconds)
        (after,) = connection.execute(position).fetchone() or (0,)
    return round(int(after - before) * 60 / seconds)


if __name__ == "__main__":
    report.main("idle", __doc__, benchmark)
