"""Ids of events and names of users."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User

from pg_eventstream import (
    sse,
    users,
)
from tests.support.long_names import SHAPES, names

# Names in ids and headers


def test_no_two_channels_have_the_same_name_in_an_id() -> None:
    long = "x" * 65
    digest = sse.quote_channel(long)
    alike = [long, f"{long}y", digest, digest.replace("%7E", "~"), digest.upper(), "~", "%7E"]
    assert len({sse.quote_channel(name) for name in alike}) == len(alike)
    for name in alike:
        assert sse.parse_id(sse.make_id({name: 7}), [*alike, "other"]) == {name: 7}


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_short_and_lead_back_to_their_channels(shape: str) -> None:
    for length in (40, 64, 65, 255):
        channels = names(shape, "run", length=length)
        event_id = sse.make_id(dict.fromkeys(channels, 10**18 - 1))
        assert len(event_id) <= 19 * (64 + 20)
        assert sse.parse_id(event_id, channels) == dict.fromkeys(channels, 10**18 - 1)


#: Users whose names look alike; None is a visitor.
KEYS = [None, "anonymous", r"\anonymous", r"\\anonymous", "Anonymous", "anonymous ", "None", "1"]


def user(key: str | None) -> Any:
    return None if key is None else User(pk=key, username=key)


def test_no_two_have_the_same_name_and_each_name_leads_back_to_its_user() -> None:
    names = [users.user_id(user(key)) for key in KEYS]
    assert len(set(names)) == len(KEYS)
    assert [users.primary_key(name) for name in names] == KEYS
