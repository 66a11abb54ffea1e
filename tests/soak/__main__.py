"""Days of work in minutes: all parts under load, with occasional small faults.

    python -m tests.soak.__main__ --minutes 10

Each tenth of the time stands for a day, which is the retention. It prints figures while it runs. It
fails (exit status 1) if an event is lost, duplicated, reordered or not pruned in time, if latency
is not flat, or if a figure has grown: see `figures`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from pg_eventstream.servers.processes import wait_until
from tests.soak import figures
from tests.soak.load import (
    CHANNELS,
    DjangoSender,
    Follower,
    PsqlSender,
    Sender,
    differences,
    together,
)
from tests.soak.parts import Faults, Parts
from tests.support.roles import granted

_SAMPLES = 60
_SHOWN = (
    *("s", "sent/s", "p50 ms", "p99 ms", "leader MB", "server 1 MB", "server 2 MB"),
    *("PostgreSQL MB", "connections", "tables MB", "rows", "dead", "oldest s"),
)
#: The publisher prunes every 30 seconds while there is something to do, and when it begins; if its
#: connection was lost, 30 seconds later.
_SWEEP_SECONDS = 75.0
#: Shorter runs mostly show the beginning.
_JUDGED_SECONDS = 120.0
_CATCH_UP_SECONDS = 60.0


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


@dataclass(frozen=True)
class Plan:
    seconds: float
    rate: float
    seed: int
    calm: bool

    @property
    def retention(self) -> float:
        return max(4.0, self.seconds / 10)


def main() -> int:
    plan = _plan()
    say(f"PG_EVENTSTREAM_TEST_SEED={plan.seed}")
    with ExitStack() as stack:
        parts = Parts(plan.retention, stack)
        followers = _followers(parts)
        for follower in followers:
            stack.enter_context(follower).wait_open(60)
        role = granted(parts.database, "sender")
        senders: list[Sender] = [
            *(DjangoSender(f"django-{n}", plan.rate / 4, plan.seed) for n in range(2)),
            *(
                PsqlSender(f"psql-{n}", plan.rate / 4, plan.seed, parts.database, role)
                for n in range(2)
            ),
        ]
        with _running(senders):
            samples, wrong = _watch(plan, parts, followers, senders)
        committed = together(senders)
        with suppress(TimeoutError):
            wait_until(
                lambda: all(follower.has_all(committed) for follower in followers),
                timeout=_CATCH_UP_SECONDS,
            )
        wrong += differences(committed, followers)
    say(f"\n{figures.summary(samples)}")
    if plan.seconds >= _JUDGED_SECONDS:
        wrong += figures.growth(samples)
    else:
        say("(too short a time to tell whether anything grows)")
    events = sum(tally.count for tally in committed.values())
    say(f"\n{events} events to {len(followers)} clients in {plan.seconds:g} s")
    for text in wrong:
        say(f"WRONG: {text}")
    say("FAILED" if wrong else "Everything arrived once, in order, and nothing has grown.")
    return 1 if wrong else 0


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.__main__", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seconds", type=float, help="in place of minutes")
    parser.add_argument("--rate", type=float, default=200, help="transactions a second")
    parser.add_argument(
        "--calm", action="store_true", help="no faults, the same processes all along"
    )
    parser.add_argument("--seed", type=int, help="repeats the faults of a run")
    given = parser.parse_args()
    seed = given.seed or int(os.environ.get("PG_EVENTSTREAM_TEST_SEED", time.time_ns()))
    return Plan(given.seconds or 60 * given.minutes, given.rate, seed, given.calm)


def _followers(parts: Parts) -> list[Follower]:
    """For each path to the events: one that stays with each channel set, and one to drop."""
    urls = {"proxy": parts.pushpin.url, "server 1": parts.urls[0], "server 2": parts.urls[1]}
    sets = {"one": CHANNELS[:1], "three": CHANNELS[1:], "all, dropped": CHANNELS}
    return [
        Follower(f"{url}/events/", list(channels), reconnect=True, name=f"{way}, {kind}")
        for way, url in urls.items()
        for kind, channels in sets.items()
    ]


@contextmanager
def _running(senders: list[Sender]) -> Iterator[None]:
    for sender in senders:
        sender.start()
    try:
        yield
    finally:
        for sender in senders:
            sender.stopping.set()
        for sender in senders:
            sender.join(60)
    for sender in senders:
        if sender.failure is not None:
            raise sender.failure


def _watch(
    plan: Plan, parts: Parts, followers: list[Follower], senders: list[Sender]
) -> tuple[list[dict[str, float]], list[str]]:
    """The figures over time, and the errors that were found immediately."""
    samples: list[dict[str, float]] = []
    steady = [follower for follower in followers if not follower.name.endswith("dropped")]
    restless = [follower for follower in followers if follower.name.endswith("dropped")]
    faults = Faults(plan.seconds, plan.seed, parts, restless)
    start = time.monotonic()
    every = max(1.0, plan.seconds / _SAMPLES)
    due, sent, oldest = every, 0, 0.0
    say(figures.heading(_SHOWN))
    while (now := time.monotonic() - start) < plan.seconds:
        time.sleep(0.1)
        if not plan.calm:
            faults.now_and_then()
        if now < due:
            continue
        latencies = [seconds for follower in steady for seconds in follower.take_latencies()]
        count = sum(tally.count for tally in together(senders).values())
        sample = {
            "s": now,
            "sent/s": (count - sent) / (now - due + every),
            **figures.of_latencies(latencies),
            **parts.figures(),
        }
        say(figures.line(sample, _SHOWN))
        samples.append(sample)
        oldest = max(oldest, sample["oldest s"])
        sent, due = count, now + every
    say(", ".join(f"{count} {name}" for name, count in faults.counts.items()))
    wrong = []
    if oldest > plan.retention + _SWEEP_SECONDS:
        wrong.append(f"an event was kept for {oldest:.0f} s; the retention is {plan.retention:g} s")
    if parts.pruned() == 0:
        wrong.append("nothing was pruned")
    return samples, wrong


if __name__ == "__main__":
    sys.exit(main())
