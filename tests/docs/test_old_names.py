"""Every name of django-eventstream exists here after the recipe of moving.md, or is printed by it.

The tables contain the names of the releases 2.0.0 to 5.3.4: those in their documentation and
examples, and all public names of their modules.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from django.contrib.staticfiles.finders import get_finder
from django.contrib.staticfiles.storage import ManifestStaticFilesStorage
from django.core.checks import run_checks
from django.core.exceptions import SynchronousOnlyOperation
from django.core.management import call_command, get_commands
from django.db import transaction
from django.template import engines
from django.test import RequestFactory, override_settings

import pg_eventstream
from pg_eventstream import (
    EventPermissionError,
    asend_event,
    get_current_event_id,
    get_events,
    send_event,
    sse,
)
from pg_eventstream.channelmanager import DefaultChannelManager
from pg_eventstream.conf import conf
from pg_eventstream.views import events
from tests.project.settings import INSTALLED_APPS
from tests.support.database import Database
from tests.support.documentation import example, text_of
from tests.support.rounds import sequence

PAGE = text_of("docs/moving.md")
HERE, _, DIFFERENT = PAGE.partition("## What is different")
RENAME = example("docs/moving.md", "grep -rlE").code

# As in documentation and examples, with the releases that have them.
LINES = {
    "import django_eventstream": "2.0.0 - 5.3.4",
    "from django_eventstream import send_event": "2.0.0 - 5.3.4",
    "from django_eventstream import channel_permission_changed": "2.0.0 - 5.3.4",
    "from django_eventstream import get_current_event_id": "2.0.0 - 5.3.4",
    "from django_eventstream import send_event, get_current_event_id": "2.0.0 - 5.3.4",
    "from django_eventstream.channelmanager import DefaultChannelManager": "2.0.0 - 5.3.4",
    "    path('events/', include(django_eventstream.urls)),": "2.0.0 - 5.3.4",
    "        URLRouter(django_eventstream.routing.urlpatterns)": "2.1.0 - 4.5.1",
    "from django_eventstream.viewsets import EventsViewSet, configure_events_view_set": (
        "5.2.0 - 5.3.4"
    ),
    "        'django_eventstream.renderers.SSEEventRenderer',": "5.2.0 - 5.3.4",
    "        'django_eventstream.renderers.BrowsableAPIEventStreamRenderer'": "5.2.0 - 5.3.4",
    "EVENTSTREAM_STORAGE_CLASS = 'django_eventstream.storage.DjangoModelStorage'": "2.0.0 - 5.3.4",
    "from django_eventstream.utils import have_channels": "2.1.0 - 4.5.1, examples",
    "from django_eventstream.models import Event": "2.6.0 - 5.3.4, examples",
}
SETTINGS = {
    "EVENTSTREAM_STORAGE_CLASS": "2.0.0 - 5.3.4",
    "EVENTSTREAM_CHANNELMANAGER_CLASS": "2.0.0 - 5.3.4",
    "EVENTSTREAM_ALLOW_ORIGIN": "2.4.0 - 5.0.1",
    "EVENTSTREAM_ALLOW_ORIGINS": "5.1.0 - 5.3.4",
    "EVENTSTREAM_ALLOW_CREDENTIALS": "2.4.0 - 5.3.4",
    "EVENTSTREAM_ALLOW_HEADERS": "4.1.0 - 5.3.4",
    "EVENTSTREAM_REDIS": "5.3.0 - 5.3.4",
    "EVENTSTREAM_STORAGE_CONNECTION": "5.2.0 - 5.3.4, in no documentation",
    "GRIP_URL": "2.0.0 - 5.3.4",
}
STATIC = {
    "eventsource.min.js": "2.0.0 - 5.3.4",
    "reconnecting-eventsource.js": "2.0.0 - 5.3.4",
    "json2.js": "2.0.0 - 5.3.4, examples",
}
COMMANDS = {"runserver_ngrok": "2.0.0 - 5.3.4"}
VIEW_KWARGS = {
    "channels": "2.0.0 - 5.3.4",
    "format-channels": "2.0.0 - 5.3.4",
    "channel": "2.0.0 - 5.3.4",
}
MANAGER_METHODS = {
    "get_channels_for_request": "2.0.0 - 5.3.4",
    "can_read_channel": "2.0.0 - 5.3.4",
    "is_channel_reliable": "2.0.0 - 5.3.4",
}
EVENT_TYPES = {
    "stream-open": "2.0.0 - 5.3.4",
    "stream-reset": "2.0.0 - 5.3.4",
    "stream-error": "2.0.0 - 5.3.4",
    "keep-alive": "2.0.0 - 5.3.4",
}
METHODS = {"GET": "2.0.0 - 5.3.4", "POST": "2.0.0 - 5.3.4, in no documentation"}
# Names of modules, documented or not, in any release.
MODULES = {
    "": "EventRequest EventResponse EventPermissionError send_event get_events"
    " get_current_event_id channel_permission_changed urls routing",
    "apps": "DjangoEventstreamConfig",
    "channelmanager": "ChannelManagerBase DefaultChannelManager",
    "consumers": "EventsConsumer Listener ListenerManager MAX_PENDING get_listener_manager"
    " listener_manager",
    "event": "Event",
    "eventrequest": "EventRequest",
    "eventresponse": "EventResponse",
    "eventstream": "EventPermissionError channel_permission_changed get_current_event_id"
    " get_events redis_client send_event",
    "models": "Event EventCounter",
    "renderers": "BrowsableAPIEventStreamRenderer SSEEventRenderer",
    "renderers.browsableapieventstreamrenderer": "BrowsableAPIEventStreamRenderer",
    "renderers.sserenderer": "SSEEventRenderer",
    "routing": "urlpatterns",
    "storage": "DjangoModelStorage RedisStorage StorageBase EventDoesNotExist"
    " IncompatibleSettings RedisPackageIsNotAvailable EVENT_TIMEOUT EVENT_TRIM_BATCH",
    "urls": "urlpatterns",
    "utils": "add_default_headers augment_cors_headers build_id_escape find_related_origin"
    " get_channelmanager get_class get_class_from_setting get_cors_from_settings get_storage"
    " have_channels load_class make_id parse_grip_last parse_last_event_id publish_event"
    " publish_kick sse_encode_error sse_encode_event sse_error_response tlocal",
    "views": "events Listener ListenerManager RedisListener MAX_PENDING get_listener_manager"
    " listener_manager stream",
    "viewsets": "EventsViewSet configure_events_view_set",
}
PATHS = [
    f"{module}.{name}".lstrip(".") for module, names in MODULES.items() for name in names.split()
]
# The forms in which they are written: imported, patched in a test, reached from the package.
FORMS = {
    "import": "from {parent} import {name}",
    "import with a comment": "from {parent} import {name} as again  # noqa: F401",
    "attribute": "it = {parent}.{name}",
    "dotted path": 'with patch("{parent}.{name}"), patch("shop.views.urls"):',
    "value": '@override_settings(SOMETHING="{parent}.{name}")',
    # Not every line with views can be decided, so these are left to a person.
    "import beside others": "from {parent} import {name}, {name} as again  # type: ignore[x]",
}


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Moved:
    return Moved(tmp_path_factory.mktemp("moved"))


class Moved:
    """What the recipe makes of a line in a separate file, and what it prints."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        lines = [*LINES, *(line for path in PATHS for line in forms(path)), *INSTALLED, *STORAGE]
        for number, line in enumerate(lines):
            (directory / f"{number:03}.py").write_text(line + "\n")
        self._numbers = {line: number for number, line in enumerate(lines)}
        self.printed = recipe(directory)

    def line(self, before: str) -> tuple[str, bool]:
        """The changed line, and whether it was printed."""
        name = f"./{self._numbers[before]:03}.py"
        printed = re.search(rf"^{re.escape(name)}:1:", self.printed, re.MULTILINE) is not None
        return (self._directory / name).read_text().rstrip("\n"), printed


def recipe(directory: Path) -> str:
    """Run the first command of the page unchanged. Returns its output."""
    done = subprocess.run(
        ["sh", "-ec", RENAME],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def forms(path: str) -> list[str]:
    parent, _, name = f"django_eventstream.{path}".rpartition(".")
    return [form.format(parent=parent, name=name) for form in FORMS.values()]


def missing(code: str) -> list[str]:
    """The names in this code that pg_eventstream does not have."""
    found = re.findall(r"pg_eventstream(?:\.\w+)*", code)
    for parent, names in re.findall(r"from (pg_eventstream[\w.]*) import ([\w, ]+)", code):
        found += [f"{parent}.{name.split()[0]}" for name in names.split(",") if name.strip()]
    return [path for path in found if not exists(path)]


def exists(path: str) -> bool:
    value: Any = import_module("pg_eventstream")
    for name in path.split(".")[1:]:
        try:
            value = getattr(value, name)
        except AttributeError:
            try:
                value = import_module(f"{value.__name__}.{name}")
            except ImportError:
                return False
    return True


@pytest.mark.parametrize("line", LINES)
def test_documented_line_works_after_the_recipe_or_is_printed(moved: Moved, line: str) -> None:
    after, printed = moved.line(line)
    assert missing(after) == []
    if "pg_eventstream" not in after:
        assert after == "" or printed
        (module,) = re.findall(r"django_eventstream\.(\w+)", line)
        assert re.search(rf"`[^`]*\b{module}\b", DIFFERENT)


@pytest.mark.parametrize("path", PATHS)
def test_path_is_there_after_the_recipe_or_is_printed(moved: Moved, path: str) -> None:
    for line in forms(path):
        after, printed = moved.line(line)
        assert missing(after) == []
        assert after == line or "django_eventstream" not in after
        if after == line:
            assert printed, line
            module, _, name = path.rpartition(".")
            assert re.search(rf"`[^`]*\b({module or name}|{name})\b", DIFFERENT), line


def test_recipe_renames_all_that_is_here(moved: Moved) -> None:
    renamed = {
        path
        for path in PATHS
        if all("django_eventstream" not in moved.line(line)[0] for line in forms(path)[:-1])
    }
    assert renamed == {
        *("send_event", "get_events", "get_current_event_id", "channel_permission_changed"),
        *("EventPermissionError", "urls", "routing", "urls.urlpatterns", "routing.urlpatterns"),
        *(f"eventstream.{name}" for name in MODULES["eventstream"].split() if "_" in name),
        *("eventstream.EventPermissionError", "views.events"),
        *("channelmanager.ChannelManagerBase", "channelmanager.DefaultChannelManager"),
        *("viewsets.EventsViewSet", "viewsets.configure_events_view_set"),
        *("renderers.SSEEventRenderer", "renderers.BrowsableAPIEventStreamRenderer"),
    } - {"eventstream.redis_client"}


NEW = '"pgtrigger", "pg_eventstream"'
INSTALLED = {
    'INSTALLED_APPS = ["shop", "django_eventstream"]': f'INSTALLED_APPS = ["shop", {NEW}]',
    'INSTALLED_APPS += ["django_eventstream"]': f"INSTALLED_APPS += [{NEW}]",
    'INSTALLED_APPS: list[str] = ["django_eventstream", "shop"]': (
        f'INSTALLED_APPS: list[str] = [{NEW}, "shop"]'
    ),
    "INSTALLED_APPS = APPS + ['django_eventstream']": (
        "INSTALLED_APPS = APPS + ['pgtrigger', 'pg_eventstream']"
    ),
    'INSTALLED_APPS.extend(["django_eventstream"])': f"INSTALLED_APPS.extend([{NEW}])",
    # For these, check reports that pgtrigger is missing.
    'INSTALLED_APPS.append("django_eventstream")': 'INSTALLED_APPS.append("pg_eventstream")',
    'INSTALLED_APPS = env.list("A", default="django_eventstream")': (
        'INSTALLED_APPS = env.list("A", default="pg_eventstream")'
    ),
    'THIRD_PARTY_APPS = ("django_eventstream",)': f"THIRD_PARTY_APPS = ({NEW},)",
    '    "django_eventstream",': '    "pgtrigger",\n    "pg_eventstream",',
    "    'django_eventstream'": "    'pgtrigger',\n    'pg_eventstream'",
    '\t"django_eventstream",  # events': '\t"pgtrigger",\n\t"pg_eventstream",  # events',
    '    "django_eventstream.apps.DjangoEventstreamConfig",': (
        '    "pgtrigger",\n    "pg_eventstream",'
    ),
    'dependencies = [("django_eventstream", "0001_initial")]': (
        'dependencies = [("pg_eventstream", "0001_initial")]'
    ),
    'LOGGING["loggers"]["django_eventstream"] = {}': 'LOGGING["loggers"]["pg_eventstream"] = {}',
}


@pytest.mark.parametrize("line", INSTALLED)
def test_recipe_installs_the_apps(moved: Moved, line: str) -> None:
    assert moved.line(line) == (INSTALLED[line], False)


PATH = '"django_eventstream.storage.DjangoModelStorage"'
STORAGE = {
    f"EVENTSTREAM_STORAGE_CLASS = {PATH}": "",
    f"    EVENTSTREAM_STORAGE_CLASS = {PATH}": "    EVENTSTREAM_STORAGE_CLASS = None",
    f"    settings.EVENTSTREAM_STORAGE_CLASS = {PATH}": (
        "    settings.EVENTSTREAM_STORAGE_CLASS = None"
    ),
    f"@override_settings(EVENTSTREAM_STORAGE_CLASS={PATH})": (
        "@override_settings(EVENTSTREAM_STORAGE_CLASS=None)"
    ),
    f'monkeypatch.setattr(settings, "EVENTSTREAM_STORAGE_CLASS", {PATH})': (
        'monkeypatch.setattr(settings, "EVENTSTREAM_STORAGE_CLASS", None)'
    ),
    f'EVENTSTREAM_STORAGE_CLASS = env("STORAGE", default={PATH})': (
        'EVENTSTREAM_STORAGE_CLASS = env("STORAGE", default=None)'
    ),
    f"STORAGE = {PATH}": f"STORAGE = {PATH}",
    'EVENTSTREAM_REDIS = {"host": "redis"}': 'EVENTSTREAM_REDIS = {"host": "redis"}',
    "del settings.EVENTSTREAM_REDIS": "del settings.EVENTSTREAM_REDIS",
    "SELECT eid FROM django_eventstream_event": "SELECT eid FROM django_eventstream_event",
}


@pytest.mark.parametrize("line", STORAGE)
def test_recipe_leaves_no_path_of_storage_that_looks_as_if_it_were_here(
    moved: Moved, line: str
) -> None:
    after, printed = moved.line(line)
    assert after == STORAGE[line]
    assert printed == bool(after)


@pytest.mark.parametrize("name", SETTINGS)
def test_setting_counts_or_the_readme_and_check_say_that_it_does_not(name: str) -> None:
    if name in inspect.getsource(type(conf)):
        assert f"`{name}`" in PAGE
        return
    assert f"`{name}" in DIFFERENT
    with override_settings(**{name: {"host": "redis"}}):
        messages = [message for message in run_checks() if message.id == "pg_eventstream.W002"]
    assert [name in message.msg for message in messages] == [True]


@pytest.mark.parametrize("name", STATIC)
def test_script_is_there_under_a_manifest(name: str, tmp_path: Path) -> None:
    assert f"`pg_eventstream/{name}`" in PAGE or f"`django_eventstream/{name}`" in DIFFERENT
    page = tmp_path / "page.html"
    old = f"django_eventstream/{name}"
    page.write_text(f'<script src="{{% static \'{old}\' %}}"></script> {{% static "{old}" %}}')
    assert "page.html" not in recipe(tmp_path)
    with override_settings(
        INSTALLED_APPS=[*INSTALLED_APPS, "django.contrib.staticfiles"],
        STATIC_URL="/static/",
        STATIC_ROOT=str(tmp_path / "static"),
        STORAGES={
            "staticfiles": {
                "BACKEND": f"{ManifestStaticFilesStorage.__module__}.ManifestStaticFilesStorage"
            }
        },
    ):
        get_finder.cache_clear()  # type: ignore[attr-defined]
        call_command("collectstatic", verbosity=0, interactive=False)
        shown = engines["django"].from_string("{% load static %}" + page.read_text()).render()
    get_finder.cache_clear()  # type: ignore[attr-defined]
    (first, second) = re.findall(r"/static/(pg_eventstream/[\w.-]+)", shown)
    assert first == second
    content = (tmp_path / "static" / first).read_text()
    is_client = name == "reconnecting-eventsource.js"
    assert ("class ReconnectingEventSource" in content) == is_client
    assert is_client or all(line.startswith("//") for line in content.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_there(name: str) -> None:
    assert get_commands()[name] == "pg_eventstream"
    assert f"`manage.py {name}`" in HERE


@pytest.mark.parametrize("name", VIEW_KWARGS)
def test_view_kwarg_chooses_the_channels(name: str) -> None:
    value = {"channels": ["room-7"], "format-channels": ["room-{pk}"], "channel": "room-7"}[name]
    request = RequestFactory().get("/?channel=other")
    kwargs = {name: value, "pk": 7}
    assert DefaultChannelManager().get_channels_for_request(request, kwargs) == ["room-7"]
    assert f"`{name}`" in HERE


@pytest.mark.parametrize("name", MANAGER_METHODS)
def test_channel_managers_have_the_method(name: str) -> None:
    assert callable(getattr(DefaultChannelManager, name))


@pytest.mark.parametrize("name", EVENT_TYPES)
def test_server_speaks_by_the_same_types(name: str) -> None:
    assert name in sse.RESERVED_TYPES
    assert f"`{name}`" in HERE


def test_send_event_has_its_parameters_in_their_order() -> None:
    assert list(inspect.signature(send_event).parameters)[:6] == [
        *("channel", "event_type", "data", "skip_user_ids", "async_publish", "json_encode")
    ]


@pytest.mark.parametrize("method", METHODS)
def test_method_is_served_or_the_readme_says_what_to_do(method: str) -> None:
    refused = events(RequestFactory().generic(method, "/?channel=a")).status_code == 405
    assert refused == (f"`{method}` opens a stream, too | 405" in DIFFERENT)


def test_coroutines_send_by_another_name(database: Database) -> None:
    async def send(await_it: bool) -> None:
        if await_it:
            await asend_event("a", "message", 1)
        else:
            send_event("a", "message", 1)

    with pytest.raises(SynchronousOnlyOperation):
        asyncio.run(send(False))
    asyncio.run(send(True))
    assert database.value("SELECT count(*) FROM pg_eventstream_event") == 1
    assert "`send_event` in a coroutine, without storage | `await asend_event(…)`" in DIFFERENT


def test_refusal_is_made_of_its_channels() -> None:
    error = EventPermissionError(["a", "b"])
    assert (error.channels, str(error)) == (["a", "b"], "Permission denied to channels: a, b")
    assert "`EventPermissionError(channels)`" in DIFFERENT


def test_names_of_the_package_are_reached_without_another_import() -> None:
    for name in ("urls", "routing", "views"):
        assert exists(f"pg_eventstream.{name}")
    with pytest.raises(AttributeError, match="no attribute 'storage'"):
        pg_eventstream.storage  # noqa: B018


def test_id_of_an_event_is_known_once_its_commit_was_sequenced(database: Database) -> None:
    with transaction.atomic():
        before = get_current_event_id(["orders"])
        send_event("orders", "paid", 1)
        assert get_current_event_id(["orders"]) == before == "orders:0"
    assert get_current_event_id(["orders"]) == before
    sequence(database)
    # An id that was read too early is a good start: nothing is missed.
    assert [event.json() for event in get_events(["orders"], before).events] == [1]
    assert get_current_event_id(["orders"]) == "orders:1"
    assert "`get_current_event_id` after `send_event`" in DIFFERENT


RELAYS = {
    "a thread that listens to Redis": """
from django_eventstream import send_event
def relay():
    pubsub = redis.from_url(URL).pubsub()
    pubsub.subscribe("events")
    for message in pubsub.listen():
        send_event(*json.loads(message["data"]))
threading.Thread(target=relay, daemon=True).start()
""",
    "a task that listens to Redis": """
import django_eventstream
async def relay():
    async with redis.pubsub() as channel:
        await channel.psubscribe("*")
        async for message in channel.listen():
            await sync_to_async(django_eventstream.send_event)("test", "message", message)
""",
    "polling Redis": """
def relay(p):
    while message := p.get_message(timeout=1):
        send_event("test", "message", message)
""",
    "a channel layer": """
class Relay(AsyncConsumer):
    async def connect(self):
        await self.channel_layer.group_add("events", self.channel_name)
    async def event(self, message):
        await sync_to_async(send_event)("test", "message", message)
""",
    "LISTEN": """
def relay(connection):
    connection.execute("LISTEN events")
    for notify in connection.notifies():
        send_event("test", "message", notify.payload)
""",
    "a fanout exchange": """
def relay(channel):
    channel.basic_consume("", lambda *a: send_event("test", "message", a[-1]))
    channel.start_consuming()
""",
    "MQTT": """
client.subscribe("sensors/#")
client.on_message = lambda client, _, message: send_event("sensors", "message", message.payload)
""",
    "a clock that an app starts": """
class ClockConfig(AppConfig):
    def ready(self):
        start_clock(lambda: send_event("clock", "tick", str(datetime.now())))
""",
    "a task of the event loop": """
async def lifespan(app):
    asyncio.create_task(tick(send_event))
""",
}
NO_RELAYS = {
    "a receiver of a signal": """
@receiver(post_save, sender=Order)
def saved(instance, **kwargs):
    transaction.on_commit(lambda: send_event("orders", "saved", instance.pk))
""",
    "a task": """
@shared_task
def work(pk):
    send_event("orders", "done", pk)
""",
    "a listener that sends no events": """
for message in redis.pubsub().listen():
    handle(message)
""",
}


def test_recipe_prints_what_may_relay_events_into_each_process(tmp_path: Path) -> None:
    """Each event would be sent once per process, so the relay has to be removed."""
    files = {**RELAYS, **NO_RELAYS}
    for name, code in files.items():
        (tmp_path / f"{name}.py").write_text(code)
    relays = recipe(tmp_path).partition("once per process:\n")[2]
    assert {line.partition(".py:")[0][2:] for line in relays.splitlines()} == set(RELAYS)
    assert "## Relays into each process" in PAGE
    assert "every event once per\nprocess" in PAGE


def test_files_with_any_name_are_moved_and_those_of_others_left(tmp_path: Path) -> None:
    line = "from django_eventstream import send_event\n"
    mine = ["a b/it's.py", "page.html", "old.htm", "x.jinja2", "x.j2", "app.ts", "App.vue", "c.tsx"]
    others = ["venv/site-packages/x.py", "node_modules/x.js", ".git/x.py", ".mypy_cache/x.json"]
    for name in (*mine, *others, "requirements.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(line)
    printed = recipe(tmp_path)
    assert all("pg_" in (tmp_path / name).read_text() for name in mine)
    assert all((tmp_path / name).read_text() == line for name in others)
    assert set(re.findall(r"^\./([\w .]+):1:from", printed, re.MULTILINE)) == {
        *("requirements.txt", "notes.md")
    }
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.unlink()
    recipe(tmp_path)  # nothing to do is not an error
