"""Reading events in Python: ids to begin with, and pages of stored events."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.db import connection
from django.http import HttpRequest, HttpResponseBase
from django.template import Context, Template
from django.test import RequestFactory, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import include, path
from django_grip import GripMiddleware

from pg_eventstream import (
    EventPermissionError,
    EventStreamError,
    InvalidRequest,
    get_current_event_id,
    get_events,
    send_event,
    send_events,
    views,
)
from pg_eventstream.channelmanager import DefaultChannelManager
from pg_eventstream.publisher.pruner import Pruner
from tests.support.database import Database
from tests.support.origin import Answer, Origin, behind_a_proxy, signature
from tests.support.rounds import prune, sequence

staff_only = override_settings(
    EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.StaffOnly"
)


def send(database: Database, *texts: str, channel: str = "c") -> None:
    send_events([(channel, "message", text, None, False) for text in texts])
    sequence(database)


# The id to begin with


def test_current_id_is_where_the_next_event_is_the_first(database: Database) -> None:
    assert get_current_event_id(["c"]) == "c:0"
    send(database, "1", "2")
    send(database, "1", channel="a b,c:d")
    current = get_current_event_id(["c", "a b,c:d", "none yet"])
    assert current == "c:2,a%20b%2Cc%3Ad:1,none%20yet:0"
    send(database, "3")
    with behind_a_proxy:
        answer = Origin().open("c", "a b,c:d", "none yet", last_event_id=current)
    assert answer.data == ["3"]


def test_current_id_of_a_channel_that_is_pruned_empty_continues_counting(
    database: Database,
) -> None:
    send(database, "1", "2")
    prune()
    assert get_current_event_id(["c"]) == "c:2"


def test_template_tag_gives_the_current_id(database: Database) -> None:
    send(database, "1", channel="it's <b>")
    send(database, "1", "2")
    template = Template(
        "{% load pg_eventstream %}"
        "{% get_current_event_id 'c' %}|{% get_current_event_id 'c' more %}|"
        "{% get_current_event_id 'c' as id %}{{ id }}"
    )
    rendered = template.render(Context({"more": ["it's <b>", "x"]}))
    assert rendered == "c:2|c:2,it%27s%20%3Cb%3E:1,x:0|c:2"


# From the earliest


@behind_a_proxy
def test_new_client_may_ask_for_the_earliest_event_that_is_kept(database: Database) -> None:
    send(database, "1", "2")
    prune()
    send(database, "3", "4")
    send(database, "1", channel="d")
    origin = Origin()
    for answer in (
        origin.open("c", "d", last_event_id="earliest"),
        origin.open("c", "d", lastEventId=["earliest"]),
    ):
        assert answer.data == ["3", "4", "1"]
        assert answer.opened_at == {"c": 2, "d": 0}
        assert "stream-reset" not in answer.control
        assert answer.events[-1].eids == {"c": 4, "d": 1}
    assert origin.open("e", last_event_id="earliest").opened_at == {"e": 0}


@behind_a_proxy
def test_from_the_earliest_page_by_page(database: Database) -> None:
    texts = [f"{n} {'x' * 1000}" for n in range(200)]
    send(database, *texts)
    origin = Origin()
    answer = origin.open("c", last_event_id="earliest")
    got = list(answer.data)
    while not answer.held:
        answer = origin.follow(answer)
        got += answer.data
    assert got == texts


def test_page_is_read_in_one_snapshot(database: Database) -> None:
    """Otherwise the pruner could run between reading the events and reading their channel."""
    send(database, "1", "2", "3")
    for start in ("earliest", "c:1", None):
        with CaptureQueriesContext(connection) as captured:
            get_events(["c", "d"], start)
        assert len(captured) == 1


def test_earliest_has_no_gap_while_events_are_pruned(database: Database) -> None:
    for n in range(20):
        send(database, *(str(n * 10 + i) for i in range(10)))
    pages = []
    with ThreadPoolExecutor(1) as pool:
        pruned = pool.submit(prune_one_by_one, database)
        while not pruned.done():
            pages.append(get_events(["c"], "earliest", limit=500))
        pruned.result()
    for page in pages:
        assert page.reset == []
        eids = [event.eid for event in page.events]
        assert eids == list(range(201 - len(eids), 201))
    assert len({len(page.events) for page in pages}) > 2


def prune_one_by_one(database: Database) -> None:
    with database.connect() as connection, override_settings(GRIP_URL=None):
        for n in range(200):
            connection.execute(
                "UPDATE pg_eventstream_stream SET sequenced_at = '2000-01-01' WHERE position = %s",
                [n + 1],
            )
            Pruner(connection).run_once()


# Pages in Python


def test_pages_follow_each_other_without_a_gap(database: Database) -> None:
    send(database, *(str(n) for n in range(25)))
    send(database, *(str(n) for n in range(25)), channel="d")
    got: list[tuple[str, int]] = []
    last, more = "earliest", True
    while more:
        page = get_events(["c", "d"], last, limit=7)
        assert len(page.events) <= 7
        got += [(event.channel, event.json()) for event in page.events]
        assert not page.events or page.events[-1].id == page.last_event_id
        last, more = page.last_event_id, page.more
    assert got == [(channel, n) for channel in "cd" for n in range(25)]
    assert get_events(["c", "d"], last).events == []
    # One can continue from the id of any event.
    third = get_events(["c", "d"], "earliest").events[2]
    assert get_events(["c", "d"], third.id).events[0].data == "3"


def test_page_has_500_events_at_most_and_one_at_least_with_any_limit(
    database: Database,
) -> None:
    send(database, *(str(n) for n in range(502)))
    for limit, count in ((1000, 500), (1, 1), (0, 1), (-2, 1)):
        page = get_events(["c"], "earliest", limit=limit)
        assert (len(page.events), page.more) == (count, True)


def test_without_an_id_there_is_only_the_id_to_continue_from(database: Database) -> None:
    send(database, "1")
    page = get_events(["c"])
    assert (page.events, page.last_event_id, page.more) == ([], "c:1", False)
    send_event("c", "greeting", {"n": 2})
    sequence(database)
    (event,) = get_events(["c"], page.last_event_id).events
    assert (event.id, event.channel, event.eid, event.type) == ("c:2", "c", 2, "greeting")
    assert event.json() == {"n": 2}


def test_page_says_what_is_gone(database: Database) -> None:
    send(database, "1", "2")
    prune()
    send(database, "3")
    page = get_events(["c", "d"], "c:1,d:0")
    assert (page.events, page.reset, page.last_event_id) == ([], ["c"], "c:3,d:0")


def test_id_that_was_never_sent_is_refused(database: Database) -> None:
    for wrong in ("x", "c:-1", "c:1,d", "c:1.5"):
        with pytest.raises(InvalidRequest, match="malformed"):
            get_events(["c"], wrong)
    with pytest.raises(EventStreamError, match="stream-error"):
        get_events(["c"], "error")


def test_string_in_place_of_a_list_of_names_is_refused(database: Database) -> None:
    for read in (get_events, get_current_event_id):
        with pytest.raises(InvalidRequest, match=r"must be a list, such as \['room'\]"):
            read("room")


class VisitorsOnly(DefaultChannelManager):
    def can_read_channel(self, user: User | None, channel: str) -> bool:
        return user is None


@override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS="tests.endpoint.test_events.VisitorsOnly")
def test_managers_know_visitors_as_none(database: Database) -> None:
    assert get_events(["c"], user=AnonymousUser()).events == []


@staff_only
def test_page_for_a_user_has_only_what_this_user_may_see(database: Database) -> None:
    ann = User.objects.create_user("ann")
    send_event("c", "message", 1, skip_user_ids=[ann.pk])
    send_event("c", "message", 2, skip_user_ids=["anonymous"])
    send_event("staff", "message", 3)
    sequence(database)

    def seen(user: User | None) -> list[int]:
        return [event.json() for event in get_events(["c"], "earliest", user=user).events]

    assert seen(ann) == [2]
    assert seen(None) == [1]
    assert len(get_events(["c", "staff"], "earliest").events) == 3  # without a user: all
    assert [e.json() for e in get_events(["c"], "earliest", user=AnonymousUser()).events] == [1]
    for user in (ann, None, AnonymousUser()):
        with pytest.raises(EventPermissionError) as raised:
            get_events(["c", "staff"], "earliest", user=user)
        assert raised.value.channels == ["staff"]


# The endpoint called by a project's own view


def my_events(request: HttpRequest, room: str) -> HttpResponseBase:
    return views.events(request, channels=[f"room-{room}"])


urlpatterns = [
    path("rooms/<room>/stream", my_events),
    path("mine/<x>/", include("pg_eventstream.urls"), {"channels": ["x"]}),
    path("events/", include("pg_eventstream.urls")),
]


@behind_a_proxy
@override_settings(ROOT_URLCONF="tests.endpoint.test_events")
def test_stream_of_a_projects_own_view_continues_at_the_url_of_the_endpoint(
    database: Database,
) -> None:
    send(database, "1", channel="room-7")
    origin = Origin()
    answer = origin.ask("/rooms/7/stream?lastEventId=earliest")
    assert answer.data == ["1"]
    assert answer.next_link.startswith("/events/next-")
    send(database, "2", channel="room-7")
    assert origin.follow(answer).data == ["2"]


@behind_a_proxy
def test_view_of_ones_own_without_an_endpoint_says_what_is_missing(database: Database) -> None:
    request = RequestFactory().get("/x", headers={"Grip-Sig": signature()})
    with (
        override_settings(ROOT_URLCONF="tests.project.no_urls"),
        pytest.raises(Exception, match=r'include\("pg_eventstream.urls"\)'),
    ):
        GripMiddleware(lambda request: my_events(request, "7"))(request)
    response = GripMiddleware(lambda request: my_events(request, "7"))(request)
    assert Answer(response).held


def test_string_in_place_of_a_list_of_channels_is_refused(database: Database) -> None:
    with behind_a_proxy, pytest.raises(Exception, match=r"must be a list of channels.*\['abc'\]"):
        GripMiddleware(lambda request: views.events(request, channels="abc"))(
            RequestFactory().get("/x", headers={"Grip-Sig": signature()})
        )
