"""What can happen in the model test, and how often: the methods of `test_model.Run`."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.model.consumers import CONSUMERS
from tests.model.model import DAY, MINUTE
from tests.model.senders import Permit, Send
from tests.model.world import CHANNELS, SENDERS

KILLS = ["killed before", "killed after"]
CALLERS = ["a role", "the hub", "a sender", "a sender", "nobody, but the cluster is another one"]


def lists(values: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, max_size=most)


users = st.sampled_from(["anonymous", "ann", "ann", "bob"])
channels = st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=3, unique=True).map(sorted)
numbers = st.integers(0, 8)
proxies = st.integers(0, 1)
at_once = st.sampled_from([True, True, False])
start = {"start": st.sampled_from(["", "", "earliest", "id"]), "ids": st.tuples(*[numbers] * 3)}
send = st.builds(
    Send,
    where=channels,
    how=st.sampled_from(["INSERT", "send_event", "send_events"]),
    skipped=st.sets(users, max_size=2),
    # Some that share a page, one too long for a page, one too long to be published.
    length=st.sampled_from([1, 1, 60, 150, 300]),
    poisonous=st.sampled_from([False, False, False, True]),
)
permit = st.builds(
    Permit,
    user=users,
    channel=st.sampled_from(["room", "room", "room", "volatile", "public"]),
    granted=st.booleans(),
)
savepoint = st.sampled_from(["SAVEPOINT", "ROLLBACK TO", "RELEASE"])
# The outcome of the publisher's next requests.
faults = lists(st.sampled_from(["", "503", "reset before", "reset after", *KILLS, *KILLS]), 4)
# The part of their pending work that the proxies do.
part = st.sampled_from(["", "items", "fetch", "go on"])

#: The frequency of each step, and its arguments.
STEPS_TO_TAKE: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {
    "transact": (
        5,
        {
            "sender": st.sampled_from(SENDERS),
            "acts": st.lists(st.one_of(send, send, permit, savepoint), min_size=1, max_size=4),
            "end": st.sampled_from([*["COMMIT", ""] * 3, "ROLLBACK", "PREPARE"]),
        },
    ),
    "end_prepared": (1, {"number": numbers, "how": st.sampled_from(["COMMIT", "ROLLBACK"])}),
    "sequence": (
        2,
        {"caller": st.sampled_from(CALLERS), "how": st.sampled_from(["COMMIT", "ROLLBACK"])},
    ),
    "publish": (3, {"faults": st.tuples(faults, faults), "between": lists(part, 6)}),
    "sweep": (
        2,
        {
            "time": st.sampled_from([0 * DAY, 2 * MINUTE, 25 * DAY / 24]),
            "lasting": st.booleans(),
        },
    ),
    "proxies_work": (2, {"part": part, "proxy": proxies, "first": numbers, "count": numbers}),
    "client_comes": (
        3,
        {"user": users, "where": channels, "proxy": proxies, **start, "at_once": at_once},
    ),
    "client": (
        2,
        {
            "number": numbers,
            "what": st.sampled_from(["goes", "resumes", "asks"]),
            "proxy": proxies,
            "at_once": at_once,
        },
    ),
    "consume": (
        2,
        {
            "name": st.sampled_from([*CONSUMERS]),
            "what": st.sampled_from(["handles", "handles", "crashes", "resets", "skips"]),
            "count": numbers,
        },
    ),
    "back_up": (1, {}),
    "restore": (
        1,
        {
            "what": st.sampled_from(["everything", "stream", "stream", "consumers"]),
            "handled": st.booleans(),
        },
    ),
    "read": (1, {"user": users, "where": channels, **start, "limit": st.integers(1, 4)}),
}
#: Those that concern consumers, and how often they are taken where nothing else is.
OF_CONSUMERS = {"transact": 5, "sequence": 1, "sweep": 3, "consume": 5, "back_up": 2, "restore": 3}


def steps(often: dict[str, int]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    return st.sampled_from([name for name, weight in often.items() for _ in range(weight)]).flatmap(
        lambda name: st.tuples(st.just(name), st.fixed_dictionaries(STEPS_TO_TAKE[name][1]))
    )


OF_ALL = {name: often for name, (often, _) in STEPS_TO_TAKE.items()}
