"""Visitors are not users, not even a user whose primary key is the text "anonymous"."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.core import signing

from pg_eventstream import (
    EventPermissionError,
    InvalidEvent,
    channel_permission_changed,
    get_events,
    send_event,
)
from pg_eventstream.grip import links
from pg_eventstream.testing import captured_events
from tests.support.alike_users import KEYS, headers, manager, user
from tests.support.database import Database
from tests.support.origin import Origin, behind_a_proxy
from tests.support.rounds import sequence

__all__ = ["manager"]  # a fixture


@pytest.mark.parametrize("how", ["users", "keys"])
@pytest.mark.parametrize("key", KEYS)
def test_only_a_user_who_is_skipped_misses_the_event(
    database: Database, key: str | None, how: str
) -> None:
    send_event("public", "message", 1, skip_user_ids=[user(key) if how == "users" else key])
    sequence(database)
    skipped = {k for k in KEYS if not get_events(["public"], "earliest", user=user(k)).events}
    # The bare text stands for both, so that no one receives an event that skips them.
    assert skipped == ({key, None} if (how, key) == ("keys", "anonymous") else {key})


def test_visitors_are_skipped_as_none_and_as_the_user_that_a_request_has(
    database: Database,
) -> None:
    for visitor in (None, AnonymousUser()):
        send_event("public", "message", 1, skip_user_ids=[visitor, "7"])
    rows = database.fetch("SELECT DISTINCT skip_user_ids FROM pg_eventstream_event")
    assert rows == [(["anonymous", "7"],)]


def test_user_that_is_not_saved_yet_cannot_be_skipped(database: Database) -> None:
    with pytest.raises(InvalidEvent, match="no primary key"):
        send_event("public", "message", 1, skip_user_ids=[User(username="ann")])
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 0


@behind_a_proxy
@pytest.mark.parametrize("key", KEYS)
def test_stream_continues_as_the_user_who_opened_it(database: Database, key: str | None) -> None:
    origin = Origin()
    mine = "visitors" if key is None else f"of {key}"
    opened = origin.ask(f"/events/?channel={mine}", headers(key))
    assert opened.held
    assert origin.follow(opened).held
    for other in KEYS:
        if other != key:
            assert not origin.ask(f"/events/?channel={mine}", headers(other)).held


@behind_a_proxy
def test_visitors_of_the_version_before_keep_their_streams(database: Database) -> None:
    content = {"c": ["visitors"], "u": "anonymous", "x": 10**9}
    token = signing.Signer(salt="pg_eventstream.next-link").sign_object(content, compress=True)
    grip_last = {"Grip-Last": "events-visitors; last-id=0"}
    assert Origin().ask(f"/events/{links.NEXT}{token}", grip_last).held


def test_captured_changes_of_permission_tell_them_apart(database: Database) -> None:
    with captured_events() as sent:
        for key in KEYS:
            channel_permission_changed(user(key), "room")
        channel_permission_changed(AnonymousUser(), "room")
    names = [name for name, _ in sent.permission_changes]
    assert len(set(names)) == len(KEYS)
    assert names[0] == names[-1] == "anonymous"


def test_get_events_asks_for_the_permission_of_the_user_that_it_is_given(
    database: Database,
) -> None:
    get_events(["visitors"], user=None)
    get_events(["of anonymous"], user=user("anonymous"))
    for wrong in ((["visitors"], user("anonymous")), (["of anonymous"], None)):
        with pytest.raises(EventPermissionError):
            get_events(wrong[0], user=wrong[1])
