"""Senders and clients of a soak. They store no events, only what shows whether all arrived."""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from django.db import connection, transaction

from pg_eventstream import send_event
from tests.support.database import Database
from tests.support.roles import psql
from tests.support.sse_client import Received, SSEClient

CHANNELS = ("soak-a", "soak-b", "soak-c", "soak-quiet")
_WEIGHTS = (60, 30, 9, 1)
_ROLLED_BACK = 0.1
_MOST_FAULTS = 5  # are reported for each client


@dataclass
class Tally:
    """What one sender has committed on one channel, or what a client has received of it."""

    count: int = 0
    total: int = 0
    last: int = 0

    def add(self, number: int) -> None:
        self.count, self.total, self.last = self.count + 1, self.total + number, number


Tallies = defaultdict[tuple[str, str], Tally]  # by channel and sender


class Sender(threading.Thread):
    """Sends numbers at a rate per second until it is stopped. Some transactions are rolled back."""

    def __init__(self, name: str, rate: float, seed: object) -> None:
        super().__init__(name=name, daemon=True)
        self.committed: Tallies = defaultdict(Tally)
        self.failure: BaseException | None = None
        self.stopping = threading.Event()
        self._rate = rate
        self._chance = random.Random(f"{seed} {name}")
        self._number = 0

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self.send_some()
        except BaseException as e:
            self.failure = e
            raise

    def send_some(self) -> None:
        raise NotImplementedError

    def _next(self) -> tuple[str, str, bool]:
        """A channel, the data to send, and whether to commit."""
        self._number += 1
        [channel] = self._chance.choices(CHANNELS, _WEIGHTS)
        commits = self._chance.random() >= _ROLLED_BACK
        text = f"{channel} {self.name} {self._number} {'yes' if commits else 'no'}"
        return channel, text, commits


class DjangoSender(Sender):
    def run(self) -> None:
        try:
            super().run()
        finally:
            connection.close()

    def send_some(self) -> None:
        if self.stopping.wait(self._chance.expovariate(self._rate)):
            return
        channel, text, commits = self._next()
        with transaction.atomic():
            send_event(channel, "message", f"{text} {time.time()}", json_encode=False)
            transaction.set_rollback(not commits)
        if commits:
            self.committed[channel, self.name].add(self._number)


class PsqlSender(Sender):
    """Sends as a service without Python does, with a role that may only send."""

    def __init__(self, name: str, rate: float, seed: object, database: Database, role: str) -> None:
        super().__init__(name, rate, seed)
        self._database, self._role = database, role

    def send_some(self) -> None:
        """Send about a second's transactions."""
        script, committed = [], []
        for _ in range(max(1, round(self._rate))):
            channel, text, commits = self._next()
            script.append(
                "BEGIN;"
                " INSERT INTO pg_eventstream_event (channel, data) VALUES"
                f" ('{channel}', '{text} ' || extract(epoch FROM clock_timestamp()));"
                f" {'COMMIT' if commits else 'ROLLBACK'};"
                f" DO 'BEGIN PERFORM pg_sleep({self._chance.expovariate(self._rate)}); END';"
            )
            if commits:
                committed.append((channel, self._number))
        done = psql(
            self._database, "-v", "ON_ERROR_STOP=1", user=self._role, script="\n".join(script)
        )
        assert done.returncode == 0, done.stderr
        for channel, number in committed:
            self.committed[channel, self.name].add(number)


@dataclass
class Follower(SSEClient):
    """Checks each event when it arrives."""

    name: str = ""
    got: Tallies = field(default_factory=lambda: defaultdict(Tally))
    faults: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.digests: dict[str, int] = {}
        """Of all of a channel, in its order."""
        self._eids = dict.fromkeys(self.channels, 0)

    def _record(self, received: Received) -> None:
        self.last_event_id = received.id
        if received.type in ("stream-open", "keep-alive"):
            if not self.control:
                super()._record(received)
            return
        if received.type.startswith("stream-"):
            self._fault(f"got {received.type}: {received.data}")
            return
        channel, sender, number, commits, sent_at = received.data.split()
        eid = received.eids[channel]
        if eid != self._eids[channel] + 1:
            self._fault(f"{channel}:{eid} came after {channel}:{self._eids[channel]}")
        if commits == "no":
            self._fault(f"{channel}:{eid} was rolled back")
        tally = self.got[channel, sender]
        if int(number) <= tally.last:
            self._fault(f"{channel}:{eid}: {sender}'s {number} came after its {tally.last}")
        tally.add(int(number))
        self._eids[channel] = eid
        self.digests[channel] = zlib.crc32(
            f"{eid} {received.data}".encode(), self.digests.get(channel, 0)
        )
        self.latencies.append(received.at - float(sent_at))

    def take_latencies(self) -> list[float]:
        """The latencies since the last call."""
        taken, self.latencies = self.latencies, []
        return taken

    def _fault(self, text: str) -> None:
        self.faults.append(f"{self.name}: {text}")

    def has_all(self, committed: Tallies) -> bool:
        return all(
            self.got.get(key, Tally()).count >= tally.count
            for key, tally in committed.items()
            if key[0] in self.channels
        )


def together(senders: Iterable[Sender]) -> Tallies:
    committed: Tallies = defaultdict(Tally)
    for sender in senders:
        committed.update(sender.committed)
    return committed


def differences(committed: Tallies, followers: Sequence[Follower]) -> list[str]:
    """The differences between the committed events and those that the clients received."""
    found: list[str] = []
    digests: dict[str, set[int]] = defaultdict(set)
    for follower in followers:
        faults = follower.faults[:_MOST_FAULTS]
        if len(follower.faults) > _MOST_FAULTS:
            faults.append(f"{follower.name}: and {len(follower.faults) - _MOST_FAULTS} more")
        found += faults
        expected = {key: tally for key, tally in committed.items() if key[0] in follower.channels}
        for key in sorted(expected.keys() | follower.got.keys()):
            if (got := follower.got[key]) != expected.get(key):
                found.append(f"{follower.name}: {key}: {got}, but {expected.get(key)} was sent")
        for channel, digest in follower.digests.items():
            digests[channel].add(digest)
    found += [
        f"{channel}: not the same at all clients"
        for channel, all_ in digests.items()
        if len(all_) > 1
    ]
    return found
