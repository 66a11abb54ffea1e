"""Views of Django REST Framework: whom they admit, what they stream, and their page."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import AsyncClient, Client, override_settings
from django.test.utils import override_script_prefix
from django.urls import resolve

from pg_eventstream import send_events
from tests.project.app.models import Membership
from tests.project.drf_settings import APPS, DRF
from tests.support import forked
from tests.support.database import Database
from tests.support.environment import child_environment
from tests.support.members import member, token
from tests.support.origin import Answer, Origin, behind_a_proxy, log_in, signature
from tests.support.rounds import sequence

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
EVENT_SOURCE = {"Accept": "text/event-stream"}


@pytest.fixture(autouse=True)
def project(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use these settings here and in the servers of the test."""
    monkeypatch.setenv("PG_EVENTSTREAM_TEST_SETTINGS", json.dumps(DRF))
    with behind_a_proxy, override_settings(**DRF):
        yield


@pytest.fixture
def origin() -> Origin:
    return Origin()


def refusal(answer: Answer) -> Any:
    """The stream-error that is the whole response."""
    assert not any(name.startswith("Grip-") for name in answer.response.headers)
    [error] = answer.all
    assert error.type == "stream-error"
    return json.loads(error.data)


# URLs, their channels, and the names of the routes of their links.
ADDRESSES = [
    ("/events/?channels=public-a,public-b", ["public-a", "public-b"], "events-next-link"),
    ("/events/?channels=public-a&channels=public-b", ["public-a", "public-b"], "events-next-link"),
    ("/events/?channel=public-a&channel=public,b", ["public-a", "public,b"], "events-next-link"),
    ("/events/?channels=public-a&format=text/event-stream", ["public-a"], "events-next-link"),
    ("/events/public-a/", ["public-a"], "events-next-link"),
    ("/events/public.v1.%C3%BC%20x/", ["public.v1.ü x"], "events-next-link"),
    ("/bare?channels=public-a", ["public-a"], "bare-next-link"),
    ("/bare/public-a", ["public-a"], "bare-next-link"),
    ("/suffix.sse", ["public-one", "public-two"], "suffix-next-link"),
    ("/class/", ["public-one", "public-two"], "class-next-link"),
    ("/function/", ["public-one", "public-two"], "function-next-link"),
    ("/nested/function/", ["public-one", "public-two"], "first:function-next-link"),
    ("/nested/events/public-a/", ["public-a"], "first:events-next-link"),
    ("/v2/versioned/events/public-a/", ["public-a"], "versioned-next-link"),
    ("/rooms/a%20b/", ["public-a b"], "at-the-mount-next-link"),
    ("/direct/", ["public-one"], "pg_eventstream-next"),
    ("/view/", ["public-one"], "pg_eventstream-next"),
]


@pytest.mark.parametrize(("path", "channels", "route"), ADDRESSES)
def test_mounted_in_every_form_it_opens_the_streams_and_follows_its_links(
    origin: Origin, path: str, channels: list[str], route: str
) -> None:
    opened = origin.ask(path, EVENT_SOURCE)
    assert opened.held
    assert sorted(opened.opened_at) == sorted(channels)
    assert "Accept" in opened.response["Vary"]
    link, address = resolve(opened.next_link), resolve(path.partition("?")[0])
    assert link.view_name == route
    assert link.kwargs.get("version") == address.kwargs.get("version")
    following = origin.follow(opened)
    assert following.held
    assert following.next_link == opened.next_link
    assert following.response["Grip-Channel"] == opened.response["Grip-Channel"]


def test_links_keep_the_prefix_that_the_server_took_off(origin: Origin) -> None:
    with override_script_prefix("/app/"):  # as Django's handlers do
        assert origin.ask("/function/").next_link.startswith("/app/function/next/")
        assert origin.ask("/events/public-a/").next_link.startswith("/app/events/next/")


def test_client_that_accepts_anything_gets_the_stream(origin: Origin) -> None:
    for accept in (
        *("*/*", "text/html;q=0.8,text/event-stream", "text/event-stream; charset=utf-8"),
        "text/event-stream;charset=UTF-8;q=0.9, */*;q=0.1",
    ):
        assert origin.ask("/function/", {"Accept": accept}).held
    assert origin.ask("/function/").held


def test_client_that_accepts_neither_stream_nor_page_is_refused(origin: Origin) -> None:
    answer = origin.ask("/function/", {"Accept": "application/json"})
    assert answer.status == 406
    assert refusal(answer)["condition"] == "not-acceptable"
    assert origin.ask("/function/?format=json").status == 404


def test_view_with_other_renderers_describes_its_stream(origin: Origin) -> None:
    response = origin.ask("/json/").response
    assert json.loads(response.content) == {
        "channels": ["public-one", "public-two"],
        "messages_types": ["message", "info"],
    }
    assert origin.ask("/json/", EVENT_SOURCE).held


@pytest.mark.parametrize(
    "path",
    [
        "/function/?channels=public-a",
        "/class/?channels=public-one",
        "/function/?messages_types=message",
        "/function/public-one/",
        "/events/public-a/?channels=public-a",
    ],
)
def test_channels_and_types_that_are_fixed_are_not_to_be_asked_for(
    origin: Origin, path: str
) -> None:
    for accept in (EVENT_SOURCE, BROWSER):
        answer = origin.ask(path, accept)
        assert answer.status == 400
        assert "are fixed. Remove" in answer.body
    assert refusal(origin.ask(path))["condition"] == "bad-request"


def test_one_name_in_place_of_a_list_is_an_error(origin: Origin) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"\['public-one'\]"):
        origin.ask("/no-list/")


def test_what_one_request_asks_for_is_gone_with_it(origin: Origin) -> None:
    page = origin.ask("/events/?channels=public-a&messages_types=info", BROWSER).body
    assert 'data-type="info"' in page
    page = origin.ask("/events/", BROWSER).body
    assert 'data-type="info"' not in page
    assert 'data-type="message"' in page
    assert "public-a" not in page
    assert origin.ask("/events/?channels=public-a").held
    assert refusal(origin.ask("/events/"))["text"] == "Invalid request: No channels specified."


def test_stream_is_that_of_the_user_whom_drf_authenticated(origin: Origin, channel: str) -> None:
    ada = member("ada", channel)
    opened = origin.ask(f"/members/{channel}/", token(ada))
    assert opened.held
    assert f"user-{ada.pk}" in opened.response["Grip-Channel"]
    assert "reads" not in opened.body

    eve = member("eve")
    error = refusal(origin.ask(f"/members/{channel}/", token(eve)))
    assert error["condition"] == "forbidden"
    assert error["channels"] == [channel]


def test_session_counts_only_where_drf_asks_for_it(origin: Origin, channel: str) -> None:
    user, cookie = log_in("ada")
    Membership.objects.create(user_id=user.pk, channel=channel)
    assert origin.ask(f"/events/{channel}/", {"Cookie": cookie}).held
    assert origin.ask(f"/members/{channel}/", {"Cookie": cookie}).status == 401


def test_next_link_needs_no_credentials_but_its_token(origin: Origin, channel: str) -> None:
    opened = origin.ask(f"/members/{channel}/", token(member("ada", channel)))
    following = origin.follow(opened)
    assert following.held
    assert following.response["Grip-Channel"] == opened.response["Grip-Channel"]
    forged = origin.ask(opened.next_link[:-2] + "x/")
    assert forged.status == 403
    assert origin.post(opened.next_link).status_code == 401
    unsigned = Client().get(opened.next_link)
    assert unsigned.status_code == 501


def test_next_link_ends_the_stream_of_a_user_who_lost_the_channel(
    origin: Origin, channel: str
) -> None:
    opened = origin.ask(f"/members/{channel}/", token(member("ada", channel)))
    Membership.objects.all().delete()
    following = origin.follow(opened)
    assert not following.held
    assert json.loads(following.control["stream-error"].data)["condition"] == "forbidden"


def test_permission_that_drf_refuses_opens_nothing(origin: Origin) -> None:
    answer = origin.ask("/members/?channels=public-a", EVENT_SOURCE)
    assert answer.status == 401
    assert answer.response["WWW-Authenticate"] == "Token"
    assert refusal(answer)["condition"] == "unauthorized"
    answer = origin.ask("/members/?channels=public-a", {"Authorization": "Token nobody"})
    assert answer.status == 401
    assert refusal(answer)["text"] == "There is no such user."
    for path in ("/nobody/?channels=public-a", "/nobody/public-a/"):
        answer = origin.ask(path)
        assert answer.status == 403
        assert refusal(answer)["condition"] == "forbidden"
        assert "data-url" not in origin.ask(path, BROWSER).body


def test_throttle_counts_streams_and_not_their_links(origin: Origin, channel: str) -> None:
    path = f"/throttled/?channels=public-{channel}"
    opened = origin.ask(path)
    for _ in range(3):
        assert origin.follow(opened).held
    answer = origin.ask(path)
    assert answer.status == 429
    assert int(answer.response["Retry-After"]) > 0
    assert refusal(answer)["condition"] == "too-many-requests"


def test_browser_may_ask_across_origins_before_it_shows_credentials() -> None:
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "GET"}
    with override_settings(EVENTSTREAM_ALLOW_ORIGIN="https://app.example"):
        response = Client().options("/members/", headers=headers)
    assert response.status_code == 204
    assert response["Access-Control-Allow-Origin"] == "https://app.example"


def test_options_are_those_of_drf(origin: Origin) -> None:
    response = Client().options("/function/")
    [metadata] = Answer(response).events
    assert json.loads(metadata.data)["renders"] == ["text/event-stream", "text/html"]
    assert response["Allow"] == "GET, HEAD, OPTIONS"
    assert Client().options("/members/").status_code == 401
    assert Client().post("/function/").status_code == 405


def test_head_opens_nothing() -> None:
    response = Client().head("/function/", headers={"Grip-Sig": signature()})
    assert response.status_code == 200
    assert not any(name.startswith("Grip-") for name in response.headers)


RENDERERS = "rest_framework.renderers."
OURS = "pg_eventstream.renderers."
STREAM, PAGE = "SSEEventRenderer", "BrowsableAPIEventStreamRenderer"


@pytest.mark.parametrize(
    ("configured", "ours"),
    [
        (None, [STREAM, PAGE]),
        ([f"{RENDERERS}JSONRenderer", f"{RENDERERS}BrowsableAPIRenderer"], [STREAM, PAGE]),
        ([f"{RENDERERS}JSONRenderer"], [STREAM]),
        (
            [
                f"{RENDERERS}JSONRenderer",
                f"{RENDERERS}BrowsableAPIRenderer",
                f"{OURS}{STREAM}",
                f"{OURS}{PAGE}",
            ],
            [STREAM, PAGE],
        ),
        ([f"{RENDERERS}BrowsableAPIRenderer", f"{OURS}{STREAM}"], [STREAM]),
        ([f"{OURS}{PAGE}", f"{RENDERERS}JSONRenderer"], [STREAM, PAGE]),
    ],
)
def test_default_renderers_decide_whether_there_is_a_page(
    configured: Sequence[str] | None, ours: list[str]
) -> None:
    rest_framework = {"DEFAULT_RENDERER_CLASSES": configured} if configured else {}
    more = json.dumps({**DRF, "REST_FRAMEWORK": rest_framework})
    script = (
        "import django; django.setup()\n"
        "from pg_eventstream.viewsets import EventsViewSet\n"
        "print(*[renderer.__name__ for renderer in EventsViewSet.renderer_classes])"
    )
    run = forked.run(
        [sys.executable, "-c", script],
        environment=child_environment(PG_EVENTSTREAM_TEST_SETTINGS=more),
    )
    assert run.stdout.split() == ours, run.stderr


def schema(urlconf: str) -> dict[str, Any]:
    """The schema by ``manage.py spectacular --fail-on-warn --validate`` for a URLconf."""
    script = (
        "import django; django.setup()\n"
        "from django.core.management import call_command\n"
        "call_command('spectacular', fail_on_warn=True, validate=True, format='openapi-json')"
    )
    project = {
        **DRF,
        "ROOT_URLCONF": urlconf,
        "INSTALLED_APPS": [*APPS, "drf_spectacular"],
        "REST_FRAMEWORK": {"DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema"},
    }
    run = forked.run(
        [sys.executable, "-c", script],
        environment=child_environment(PG_EVENTSTREAM_TEST_SETTINGS=json.dumps(project)),
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_schema_of_a_project_warns_of_no_stream_and_has_those_that_are_described() -> None:
    paths = schema("tests.project.drf_described")["paths"]
    assert list(paths) == ["/described/", "/orders/"]
    [stream] = paths["/described/"]["get"]["responses"]["200"]["content"]
    assert stream == "text/event-stream"


def test_library_works_without_drf() -> None:
    script = (
        "import sys; sys.modules['rest_framework'] = None\n"
        "import django; django.setup()\n"
        "import pg_eventstream, pg_eventstream.views, tests.project.urls"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        env=child_environment(PG_EVENTSTREAM_TEST_SETTINGS="{}"),
        check=True,
        timeout=60,
    )


def test_page_names_channels_and_types_as_text(origin: Origin) -> None:
    path = "/events/?channels=public-%3Cb%3E%22&messages_types=%3Ci%3E"
    for answer in (origin.ask(path, BROWSER), origin.ask(f"{path}&format=api_sse", BROWSER)):
        assert answer.status == 200
        assert answer.response["Content-Type"] == "text/html; charset=utf-8"
        assert "public-&lt;b&gt;&quot;" in answer.body
        assert 'data-type="&lt;i&gt;"' in answer.body
        assert "event: message" not in answer.body
        assert not any(name.startswith("Grip-") for name in answer.response.headers)
        [section] = [line for line in answer.body.splitlines() if "data-url" in line]
        assert "format=" not in section


def test_page_tells_whom_the_proxy_is_missing(origin: Origin) -> None:
    hint = "Open it at the proxy"
    assert hint not in origin.ask("/function/", BROWSER).body
    assert hint in Client().get("/function/", headers=BROWSER).content.decode()


@pytest.mark.parametrize(
    ("asgi", "settings", "hint"),
    [
        (True, {"GRIP_URL": None}, ""),
        (True, {}, ""),  # past the proxy, which is allowed: the application streams
        (True, {"GRIP_PROXY_REQUIRED": True}, "Open it at the proxy"),
        (False, {}, "Open it at the proxy"),
        (False, {"GRIP_URL": None}, "an ASGI server"),
    ],
)
def test_page_says_that_no_events_will_arrive_only_where_none_do(
    asgi: bool, settings: dict[str, Any], hint: str
) -> None:
    async def ask(headers: dict[str, str]) -> tuple[int, str]:
        response: Any = await AsyncClient().get("/function/", headers=headers)
        if not response.streaming:
            return response.status_code, response.content.decode()
        stream = aiter(response.streaming_content)
        text = (await anext(stream)).decode()
        await stream.aclose()
        return response.status_code, text

    def get(headers: dict[str, str]) -> tuple[int, str]:
        if asgi:
            return asyncio.run(ask(headers))
        response = Client().get("/function/", headers=headers)
        return response.status_code, response.content.decode()

    with override_settings(**settings):
        status, page = get(BROWSER)
        assert (status, "data-url" in page) == (200, True)
        assert ("no events will arrive here" in page) == bool(hint)
        assert hint in page
        status, stream = get(EVENT_SOURCE)
    assert (status, "event: stream-open" in stream) == ((501, False) if hint else (200, True))


def test_page_without_channels_says_how_to_name_them(origin: Origin) -> None:
    page = origin.ask("/events/", BROWSER).body
    assert "?channels=news,sport</code>" in page
    assert "reconnecting-eventsource.js" not in page


def test_page_renderer_leaves_other_views_as_they_are(origin: Origin) -> None:
    for path in ("/no-stream/?format=api_sse", "/no-stream/"):
        page = origin.ask(path, BROWSER if "format" in path else {"Accept": "text/html"}).body
        assert "seven" in page
        assert "data-url" not in page


@pytest.mark.parametrize(
    "path",
    [
        *("/mounted/view/?channels=secret", "/mounted/news/view/?channels=secret"),
        *("/mounted/set/?channels=secret", "/mounted/set/secret/"),
    ],
)
def test_query_never_takes_the_place_of_what_the_urlconf_says(
    database: Database, origin: Origin, path: str
) -> None:
    send_events([("secret", "message", "for nobody here")])
    sequence(database)
    settings = {
        "ROOT_URLCONF": "tests.project.drf_mounts",
        "EVENTSTREAM_CHANNELMANAGER_CLASS": "pg_eventstream.channelmanager.DefaultChannelManager",
    }
    with override_settings(**settings):
        answer = origin.ask(path, {**EVENT_SOURCE, "Last-Event-ID": "earliest"})
    assert answer.status == 400
    assert "for nobody here" not in answer.body
