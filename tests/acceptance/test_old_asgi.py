"""Projects written for django-eventstream with Channels run after the recipe of docs/moving.md."""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pg_eventstream import send_event
from pg_eventstream.servers.processes import accepts
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.documentation import example
from tests.support.forked import ForkedProcess
from tests.support.origin import log_in, signature
from tests.support.projects import Project
from tests.support.publisher import PublisherProcess
from tests.support.sse_client import SSEClient

RENAME = example("docs/moving.md", "grep -rlE").code

SETTINGS = """
import os

SECRET_KEY = os.environ["SECRET_KEY"]
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "server.urls"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ["PGDATABASE"],
        "USER": os.environ["PGUSER"],
        "HOST": os.environ["PGHOST"],
        "PORT": os.environ["PGPORT"],
    }
}
INSTALLED_APPS = [
    'channels',
    'django_eventstream',
    'django.contrib.contenttypes',
    'django.contrib.auth',
    'django.contrib.sessions',
]
MIDDLEWARE = [
    'django_grip.GripMiddleware',
    'django.contrib.sessions.middleware.SessionMiddleware',
    'django.contrib.auth.middleware.AuthenticationMiddleware',
]
GRIP_URL = os.environ["GRIP_URL"]
ASGI_APPLICATION = 'server.asgi.application'
EVENTSTREAM_STORAGE_CLASS = 'django_eventstream.storage.DjangoModelStorage'
EVENTSTREAM_CHANNELMANAGER_CLASS = 'server.channelmanager.MyChannelManager'
"""
MANAGER = """
from django_eventstream.channelmanager import DefaultChannelManager


class MyChannelManager(DefaultChannelManager):
    def can_read_channel(self, user, channel):
        return user is not None or not channel.startswith('_')

    def get_channels_for_request(self, request, view_kwargs):
        if 'of-session' in view_kwargs:
            return {'_user-' + request.session.get('_auth_user_id', '')}
        return super().get_channels_for_request(request, view_kwargs)
"""
# From the documentation of 4.0 to 4.5. Django is not set up when it names the routes.
ASGI = """
import os

from django.core.asgi import get_asgi_application
from django.urls import path, re_path
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.auth import AuthMiddlewareStack
import django_eventstream

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "server.settings")


class Tokens:
    def __init__(self, inner):
        self.inner = inner

    async def __call__(self, scope, receive, send):
        from django.contrib.auth.models import AnonymousUser, User

        users = User.objects.filter(username=dict(scope["headers"]).get(b"x-user", b"").decode())
        user = await users.afirst() or AnonymousUser()
        await self.inner({**scope, "user": user}, receive, send)


application = ProtocolTypeRouter({
    'http': URLRouter([
        path('events/', AuthMiddlewareStack(
            URLRouter(django_eventstream.routing.urlpatterns)
        ), { 'channels': ['test'] }),
        re_path(r'^rooms/(?P<room>[^/]+)/events/', AuthMiddlewareStack(
            URLRouter(django_eventstream.routing.urlpatterns)
        ), {'format-channels': ['_room-{room}']}),
        path('mine/', AuthMiddlewareStack(
            URLRouter(django_eventstream.routing.urlpatterns)
        ), {'of-session': True}),
        path('one/<channel>/', URLRouter(django_eventstream.routing.urlpatterns)),
        path('query/', Tokens(URLRouter(django_eventstream.routing.urlpatterns))),
        re_path(r'', get_asgi_application()),
    ]),
})
"""
# From that of 2.1 to 3.1, with the current names of its url() and AsgiHandler.
APP_ROUTING = """
from django.core.asgi import get_asgi_application
from django.urls import re_path
from channels.routing import URLRouter
from channels.auth import AuthMiddlewareStack
import django_eventstream

urlpatterns = [
    re_path(r'^events/', AuthMiddlewareStack(
        URLRouter(django_eventstream.routing.urlpatterns)
    ), {'channels': ['test']}),
    re_path(r'', get_asgi_application()),
]
"""
ROUTING = """
from channels.routing import ProtocolTypeRouter, URLRouter
import app.routing

application = ProtocolTypeRouter({
    'http': URLRouter(app.routing.urlpatterns),
})
"""
OLD_ASGI = """
import os
import django
from channels.routing import get_default_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "server.settings")
django.setup()
application = get_default_application()
"""
URLS = """
from django.http import HttpResponse
from django.urls import include, path
import django_eventstream

urlpatterns = [path("", lambda request: HttpResponse("home"))]
"""


@pytest.fixture
def project(database: Database, pushpin: Pushpin, tmp_path: Path) -> Iterator[Project]:
    with Project(tmp_path, "server.settings", database, pushpin) as made:
        made.write("server/__init__.py", "")
        made.write("server/settings.py", SETTINGS)
        made.write("server/channelmanager.py", MANAGER)
        made.write("server/urls.py", URLS)
        yield made


@contextmanager
def serve(project: Project, port: int) -> Iterator[str]:
    """Move the project by the recipe of docs/moving.md and run it with Daphne. Returns its URL."""
    printed = project.run("sh", "-ec", RENAME)
    assert re.findall(r"^\./.*", printed, re.MULTILINE) == []
    assert "no issues" in project.manage("check", "--fail-level=WARNING")
    server = ForkedProcess(
        "daphne",
        [sys.executable, "-m", "daphne", "server.asgi:application", f"--port={port}"],
        log_path=project.directory / "daphne.log",
        # Its asgi.py sets the settings module after it has imported this package.
        environment={k: v for k, v in project.environment.items() if "DJANGO" not in k},
    )
    server.start(ready=lambda: accepts(port))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(timeout=10)


def opened(url: str, *channels: str, **headers: str) -> str:
    """The beginning of a stream."""
    with SSEClient(url, list(channels), headers=headers) as client:
        client.wait_for(lambda: bool(client.control))
        return f"{client.control[0].type} {client.control[0].id} {client.control[0].data}"


def test_old_asgi_py_streams_without_a_proxy_as_before(project: Project, app_port: int) -> None:
    project.write("server/asgi.py", ASGI)
    user, cookie = log_in("ann")
    with serve(project, app_port) as url:
        with urllib.request.urlopen(f"{url}/", timeout=20) as response:
            assert response.read() == b"home"
        # Channels by the routes, users by Channels' middleware or another one.
        assert opened(f"{url}/events/") == "stream-open test:0 "
        assert opened(f"{url}/one/tea/") == "stream-open tea:0 "
        assert opened(f"{url}/query/", "b", "a") == "stream-open a:0,b:0 "
        assert "forbidden" in opened(f"{url}/rooms/tea/events/")
        assert opened(f"{url}/rooms/tea/events/", Cookie=cookie) == "stream-open _room-tea:0 "
        assert opened(f"{url}/mine/", Cookie=cookie) == f"stream-open _user-{user.pk}:0 "
        assert "forbidden" in opened(f"{url}/query/", "_a", Cookie=cookie)
        assert opened(f"{url}/query/", "_a", **{"X-User": "ann"}) == "stream-open _a:0 "
        # Events that another process sends arrive.
        with SSEClient(f"{url}/rooms/tea/events/", headers={"Cookie": cookie}) as client:
            client.wait_open()
            send_event("_room-tea", "message", {"text": "not for ann"}, skip_user_ids=[user])
            send_event("_room-tea", "message", {"text": "hello"})
            assert json.loads(client.wait_count(1)[0].data) == {"text": "hello"}
            assert client.events[0].eids == {"_room-tea": 2}


def ask(url: str, **headers: str) -> tuple[int, dict[str, str]]:
    """The server's response to the proxy."""
    request = urllib.request.Request(url, headers={"Grip-Sig": signature(), **headers})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {}


def test_older_routing_py_streams_through_a_proxy_by_the_urlconf(
    project: Project, app_port: int, pushpin: Pushpin, channel: str
) -> None:
    project.write("app/__init__.py", "")
    project.write("app/routing.py", APP_ROUTING.replace("test", channel))
    project.write("server/routing.py", ROUTING)
    project.write("server/asgi.py", OLD_ASGI)
    project.write("server/settings.py", "ASGI_APPLICATION = 'server.routing.application'\n")
    project.write(
        "server/urls.py", 'urlpatterns += [path("sse/", include(django_eventstream.urls))]'
    )
    with serve(project, app_port) as url:
        assert opened(f"{url}/events/") == f"stream-open {channel}:0 "
        status, headers = ask(f"{url}/events/")
        assert (status, headers["Grip-Hold"]) == (200, "stream")
        link = re.match(r"<(/sse/next-[^<>]*)>", headers["Grip-Link"])
        assert link
        last = headers["Grip-Channel"].replace("prev-id", "last-id")
        status, headers = ask(url + link[1], **{"Grip-Last": last})
        assert (status, headers["Grip-Hold"]) == (200, "stream")
        publisher = PublisherProcess(project.directory / "publisher.log", project.environment)
        with ExitStack() as stack:
            stack.callback(publisher.kill)
            publisher.lead()
            client = stack.enter_context(SSEClient(f"{pushpin.url}/events/"))
            client.wait_open()
            send_event(channel, "message", "through the proxy")
            assert json.loads(client.wait_count(1)[0].data) == "through the proxy"


def test_without_that_the_log_says_what_to_add(project: Project, app_port: int) -> None:
    project.write("server/asgi.py", ASGI)
    # Users and sessions by Channels alone, which sufficed for the streams of such a project.
    project.write("server/settings.py", "MIDDLEWARE = ['django_grip.GripMiddleware']\n")
    user, cookie = log_in("ann")
    with serve(project, app_port) as url:
        assert ask(f"{url}/events/")[0] == 500
        assert opened(f"{url}/mine/", Cookie=cookie) == f"stream-open _user-{user.pk}:0 "
        assert "forbidden" in opened(f"{url}/mine/")
    log = (project.directory / "daphne.log").read_text()
    assert 'Add path("events/", include("pg_eventstream.urls")) to the URLconf' in log
