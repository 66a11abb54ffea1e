"""Requests with any content: handled properly, and never with the data of another user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from string import ascii_letters, digits
from typing import Any
from urllib.parse import quote, quote_from_bytes

import pytest
from django.test import Client, override_settings
from hypothesis import example, given, note
from hypothesis import strategies as st

from pg_eventstream import send_events
from pg_eventstream.errors import InvalidRequest
from pg_eventstream.grip import links, names
from tests.fuzz.hostile import SEED, Parsed, fuzzed, header_values, parse_strictly, texts
from tests.project.drf_settings import DRF
from tests.support.database import Database
from tests.support.origin import behind_a_proxy, signature
from tests.support.rounds import sequence

pytestmark = pytest.mark.faults

SECRET = "for somebody else"
PAGE = "https://a.example"
OPEN = ["%I %% \n\n %(events-c)s", "2\r\nevent: forged"]
HEADERS = [
    *("Last-Event-ID", "Grip-Sig", "Grip-Last", "Grip-Feature", "Grip-Status", "Grip-Hold"),
    *("Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers", "Accept"),
    *("Host", "Cookie", "Authorization", "Content-Type", "Connection-Id", "Meta-User"),
    *("X-Forwarded-For", "X-HTTP-Method-Override", "If-None-Match", "Accept-Encoding", "Range"),
]
QUERY = ["channel", "channels", "lastEventId", "messages_types", "format", "next", "link", "u"]
STATUSES = {200, 204, 400, 401, 403, 404, 405, 406, 501}
OURS = {"message", "stream-open", "stream-error", "stream-reset"}
#: All headers of a response; a header that a request could add is not among them.
ANSWERED = {
    *("content-type", "content-length", "content-encoding", "cache-control", "x-accel-buffering"),
    *("grip-hold", "grip-channel", "grip-set-meta", "grip-link", "grip-keep-alive"),
    *("access-control-allow-origin", "access-control-allow-credentials", "vary", "allow"),
    *("access-control-allow-methods", "access-control-allow-headers", "access-control-max-age"),
    *("location", "www-authenticate", "content-security-policy"),
}


@pytest.fixture(autouse=True)
def kept(database: Database) -> Iterator[None]:
    """Two events that anyone may read, and some that no visitor may read."""
    with (
        behind_a_proxy,
        override_settings(
            EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channelmanagers.StaffOnly",
            EVENTSTREAM_ALLOW_ORIGINS=[PAGE],
            EVENTSTREAM_ALLOW_CREDENTIALS=True,
        ),
    ):
        send_events(
            [(c, "message", text, None, False) for c in ("c", "public-one") for text in OPEN]
        )
        send_events([("c", "message", SECRET, ["anonymous"], False)])
        send_events([(name, "message", SECRET, None, False) for name in ("staff", "d", "secret")])
        database.execute(
            "UPDATE pg_eventstream_event SET skip_user_ids = '{anonymous}' WHERE channel = 'd'"
        )
        sequence(database)
        yield


KNOWN = ["c", "d", "staff", "public-one", "c:0", "c:0,d:0,staff:0", "public-one:0", "earliest"]
values = st.one_of(
    texts.map(lambda text: text.encode()),
    st.binary(max_size=12),
    st.sampled_from(KNOWN).map(lambda text: text.encode()),
)


def as_query(pairs: list[tuple[str, bytes]]) -> str:
    return "&".join(f"{name}={quote_from_bytes(value)}" for name, value in pairs)


# Requests that would open a stream except for one detail.
likely = st.builds(
    lambda names, last, more: as_query(
        [*(("channel", name) for name in names), ("lastEventId", last), *more]
    ),
    st.lists(
        st.one_of(st.sampled_from([b"c", b"d", b"staff", b"public-one"]), values),
        min_size=1,
        max_size=2,
        unique=True,
    ),
    st.sampled_from([b"earliest", b"c:0,staff:0", b"staff:0,d:0", b"public-one:0", b""]),
    st.lists(st.tuples(st.sampled_from(QUERY), values), max_size=1),
)
queries = st.one_of(
    likely,
    likely,
    st.lists(st.tuples(st.sampled_from(QUERY), values), max_size=5).map(as_query),
    st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=40),
)
no_headers: dict[str, str] = {}
headers = st.one_of(
    st.just(no_headers),
    st.dictionaries(
        st.sampled_from(HEADERS),
        st.one_of(
            header_values,
            st.sampled_from(["text/event-stream", PAGE, *KNOWN]),
            st.lists(st.builds("{}; last-id={}".format, header_values, header_values)).map(
                ",".join
            ),
        ),
        max_size=5,
    ),
)
signs = st.sampled_from([True, True, True, False])
methods = st.one_of(
    st.just("GET"),
    st.just("GET"),
    st.sampled_from(["HEAD", "OPTIONS", "POST", "PATCH", "QUERY", "\0"]),
)


def ask(method: str, path: str, query: str, headers: dict[str, str], signed: bool) -> Any:
    """One request, as a server passes it to Django. An exception in a view fails the test."""
    environ: dict[str, Any] = {
        "HTTP_" + name.upper().replace("-", "_"): value for name, value in headers.items()
    }
    environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
    if signed:
        environ["HTTP_GRIP_SIG"] = signature()
    return Client().generic(method, path, QUERY_STRING=query, **environ)


def check(response: Any) -> list[Parsed]:
    """It contains nothing from the request, and nothing that this visitor may not read."""
    assert response.status_code in STATUSES
    for name, value in response.headers.items():
        assert name.lower() in ANSWERED
        assert not set("\r\n\0") & set(value), (name, value)
        assert SECRET not in value
    assert response.headers.get("Access-Control-Allow-Origin", PAGE).lower() == PAGE
    text = response.content.decode()
    assert SECRET not in text
    if response.headers.get("Content-Type") != "text/event-stream; charset=utf-8":
        assert "Grip-Channel" not in response.headers
        return []
    if "Grip-Channel" in response.headers:
        assert "%" not in text.replace("%%", "")
        text = text.replace("%%", "%")
    events = parse_strictly(text)
    assert {event.type for event in events} <= OURS
    sent = [event.data for event in events if event.type == "message"]
    assert set(sent) <= {data.replace("\r\n", "\n") for data in OPEN}
    return events


def leads_on_only_here(response: Any) -> None:
    """A next link is a path of the endpoint, and no other header could be taken for one."""
    link = response.headers.get("Grip-Link")
    if link is not None:
        path, separator, rest = link.removeprefix("<").partition(">; rel=next")
        assert link.startswith("</")
        assert not path.startswith("//")
        assert separator
        assert not set("<>,; \"'?#") & set(path)
        assert rest.startswith("; timeout=")
        token = re.search(r"/next[-/]([^/]+)/?$", path)
        assert token
        assert links.unsign(token[1]).user_id == "anonymous"


@fuzzed(200, 2500)
@given(methods, queries, headers, signs)
@example("GET", "channel=c&channel=d&lastEventId=earliest", {}, True)
@example("GET", "channel=staff&lastEventId=earliest", {}, True)
@example("GET", "channel=a%00b", {}, True)
@example("GET", "channel=c", {"Origin": "https://evil.example"}, True)
def test_any_request_for_a_stream_is_answered_in_order(
    method: str, query: str, headers: dict[str, str], signed: bool
) -> None:
    note(SEED)
    response = ask(method, "/events/", query, headers, signed)
    check(response)
    leads_on_only_here(response)


@fuzzed(80, 1200)
@given(methods, texts, queries, headers, st.booleans(), signs)
@example("GET", '<>; rel="next", é%', "", {}, False, True)
def test_any_path_is_answered_in_order(
    method: str, room: str, query: str, headers: dict[str, str], further: bool, signed: bool
) -> None:
    note(SEED)
    path = f"/rooms/{quote(room, safe='')}/events/{links.NEXT if further else ''}"
    response = ask(method, path, query, headers, signed)
    check(response)
    leads_on_only_here(response)


@fuzzed(120, 1500)
@given(methods, values, headers)
def test_next_link_cannot_be_guessed(method: str, token: bytes, headers: dict[str, str]) -> None:
    note(SEED)
    response = ask(
        method, f"/events/{links.NEXT}{quote_from_bytes(token)}", "", headers, signed=True
    )
    check(response)
    assert response.status_code != 200
    assert not any(name.startswith("Grip-") for name in response.headers)


@fuzzed(100, 2500)
@given(st.data())
def test_no_link_can_be_made_of_another(data: st.DataObject) -> None:
    note(SEED)
    session = links.Session(("c", "staff"), "7", {"c": 0})
    token = links.sign(session)
    start = data.draw(st.integers(0, len(token)))
    end = data.draw(st.integers(start, len(token)))
    piece = st.one_of(texts, st.text(f"{ascii_letters}{digits}-_:.=", max_size=8))
    forged = token[:start] + data.draw(piece) + token[end:]
    if forged == token:
        return
    with pytest.raises(InvalidRequest):
        links.unsign(forged)


sent_last = st.one_of(st.sampled_from(["0", "1", "2"]), header_values)


@fuzzed(80, 1500)
@given(headers, sent_last, sent_last, st.lists(st.tuples(texts, sent_last), max_size=2))
def test_link_gives_only_its_own_events_for_any_claim_of_the_proxy(
    headers: dict[str, str], c: str, d: str, more: list[tuple[str, str]]
) -> None:
    note(SEED)
    claims = [
        f"{names.events_channel(name)}; last-id={n}" for name, n in [("c", c), ("d", d), *more]
    ]
    token = links.sign(links.Session(("c", "d"), "anonymous"))
    headers = {"Grip-Last": ", ".join(claims), **headers}
    response = ask("GET", f"/events/{links.NEXT}{token}", "channel=staff", headers, signed=True)
    check(response)
    leads_on_only_here(response)


# Django REST Framework

ACCEPTED = ["text/event-stream", "text/html", "application/json", "*/*", "text/event-stream;q=0"]


@fuzzed(60, 1500)
@given(
    methods,
    st.sampled_from(["events/", "members/", "class/", "json/", "view/", "rooms/{}/", "events/{}/"]),
    texts,
    queries,
    headers,
    st.one_of(st.sampled_from(ACCEPTED), header_values),
    signs,
)
@example("GET", "rooms/{}/", "a,b;c'd", "", {}, "text/event-stream", True)
def test_any_request_for_a_view_of_the_rest_framework_is_answered_in_order(
    method: str,
    path: str,
    part: str,
    query: str,
    headers: dict[str, str],
    accept: str,
    signed: bool,
) -> None:
    note(SEED)
    with override_settings(**DRF):
        path = "/" + path.format(quote(part, safe=""))
        response = ask(method, path, query, {"Accept": accept, **headers}, signed)
        if method != "OPTIONS" or response.status_code != 200:  # a description of the view
            check(response)
        assert "<script>alert(1)" not in response.content.decode()
    leads_on_only_here(response)
