"""Every example of the README is run as it stands there."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from django.contrib.auth.models import Group, User

from pg_eventstream.servers.processes import accepts
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.browser import Page
from tests.support.database import Database
from tests.support.origin import log_in
from tests.support.projects import ROOT, Project
from tests.support.roles import psql
from tests.support.sse_client import SSEClient


@dataclass(frozen=True)
class Example:
    language: str
    code: str

    @property
    def path(self) -> str | None:
        """The file that it belongs to, if its first line says so."""
        found = re.match(r"# ([\w/]+\.py)\n", self.code)
        return found and found[1]


README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = [
    Example(language, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE))
    for indent, language, code in re.findall(
        r"^( *)```(\w+)\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE
    )
]
# Each by words that only it has.
SETTINGS, URLS, PAGE = "INSTALLED_APPS +=", '"rooms/<room>/events/"', "import { Reconnecting"
MANAGER, MANAGER_SETTING = "def can_read_channel", "EVENTSTREAM_CHANNELMANAGER_CLASS ="
REVOKE, SEND, READ, TEST = "user.groups.remove", "order.paid = True", "page = get_", "OrderTest"
ROLE, INSERT, NODE, UNIT = "CREATE ROLE", "BEGIN;", "client.query", "[Service]"
FOLLOW, STREAM_TEST = "async def follow", "StreamTest"
ORIGINS, API, PROXIES = "_ALLOW_CRED", "NewsViewSet(", "GRIP_PROXIES = ["
INSTALL, INSTALL_DRF = "install pg-", "[drf]"
DEVELOPMENT = 'INSTALLED_APPS = ["daphne"'
SECOND_DATABASE, MIGRATE = 'DATABASES["events"]', "manage.py migrate\npython manage.py migrate pg_"
# Run by make itself, and by tests/test_moving.py.
ELSEWHERE = ["make demo", "grep -rlE", "eventstream_import\n"]
HERE = [
    *(SETTINGS, URLS, PAGE, MANAGER, MANAGER_SETTING, REVOKE, SEND, READ, TEST),
    *(ROLE, INSERT, NODE, UNIT, FOLLOW, ORIGINS, API, PROXIES, INSTALL, INSTALL_DRF),
    *(STREAM_TEST, SECOND_DATABASE, MIGRATE, DEVELOPMENT),
]


def example(words: str) -> Example:
    (found,) = (one for one in EXAMPLES if words in one.code)
    return found


def test_every_example_is_run_by_a_test() -> None:
    assert len(EXAMPLES) == len(HERE) + len(ELSEWHERE)
    assert {example(words) for words in [*HERE, *ELSEWHERE]} == set(EXAMPLES)


BEFORE = """
import os
SECRET_KEY = os.environ["SECRET_KEY"]
DEBUG = True
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "myproject.urls"
STATIC_URL = "/static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {
    "ENGINE": "django.db.backends.postgresql",
    "NAME": os.environ["PGDATABASE"],
    "USER": os.environ["PGUSER"],
    "HOST": os.environ["PGHOST"],
    "PORT": os.environ["PGPORT"],
}}
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "shop",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
TEMPLATES = [{
    "BACKEND": "django.template.backends.django.DjangoTemplates",
    "DIRS": [os.environ["PROJECT"]],
    "APP_DIRS": True,
}]
"""
MODELS = """
from django.db import models, transaction
from pg_eventstream import send_event

class Checkpoint(models.Model):
    name = models.TextField()
    event_id = models.TextField(default="")

class Order(models.Model):
    paid = models.BooleanField(default=False)

    def pay(self):
        with transaction.atomic():
            self.paid = True
            self.save()
            send_event("orders", "paid", {"order": self.pk})
"""
MORE_URLS = """
from django.views.generic import TemplateView
from django.http import HttpResponse
urlpatterns += [
    path("", TemplateView.as_view(template_name="page.html")),
    path("favicon.ico", lambda request: HttpResponse(status=204)),
]
"""


@pytest.fixture
def project(database: Database, pushpin: Pushpin, tmp_path: Path) -> Iterator[Project]:
    """What a reader has before the README, and the settings and addresses from it."""
    with Project(tmp_path, "myproject.settings", database, pushpin) as made:
        made.environment["PROJECT"] = str(tmp_path)
        made.write("myproject/__init__.py", "")
        made.write("myproject/settings.py", BEFORE)
        for words in (SETTINGS, URLS):
            add(made, example(words))
        # The address that this test's proxy has, in place of Pushpin's usual one.
        made.write("myproject/settings.py", '\nGRIP_URL = os.environ["GRIP_URL"]\n')
        made.write("myproject/urls.py", MORE_URLS)
        made.write("page.html", example(PAGE).code)
        made.write("shop/__init__.py", "")
        made.write("shop/models.py", MODELS)
        yield made


def add(project: Project, one: Example) -> None:
    assert one.path, one.code
    project.write(one.path, one.code)


def migrate(project: Project) -> None:
    assert "no issues" in project.manage("check", "--fail-level=WARNING")
    project.manage("migrate", "--run-syncdb", "--verbosity=0")


def run_python(project: Project, one: Example, before: str = "", after: str = "") -> str:
    return project.manage("shell", "--no-imports", "-c", f"{before}\n{one.code}\n{after}")


def test_setup_page_and_senders_work_together(
    project: Project,
    database: Database,
    pushpin: Pushpin,
    app_port: int,
    page: Page,
    node_directory: Path,
) -> None:
    migrate(project)
    project.serve(app_port)
    page.goto(f"{pushpin.url}/")
    clients = [
        SSEClient(f"{pushpin.url}/events/", ["orders", "room-1"]),
        SSEClient(f"{pushpin.url}/rooms/1/events/"),
    ]
    with clients[0] as orders, clients[1] as room:
        orders.wait_open()
        room.wait_open()
        run_python(
            project,
            example(SEND),
            before="from shop.models import Order\norder, shipped = Order.objects.create(), [8, 9]",
            after="send_event('room-1', 'message', {'text': 'hello & <b>'})",
        )
        assert room.wait_count(1)[0].data == '{"text": "hello & <b>"}'
        page.wait_for("document.body.textContent.includes('hello & <b>')")

        database.execute("CREATE TABLE invoice (id integer, paid boolean)")
        database.execute("INSERT INTO invoice VALUES (7, false)")
        roles = psql(database, script=example(ROLE).code)
        assert (roles.returncode, roles.stderr) == (0, "")
        try:
            database.execute("GRANT UPDATE, SELECT ON invoice TO billing")
            sent = psql(database, script=example(INSERT).code, user="billing")
            assert (sent.returncode, sent.stderr) == (0, "")
            (node_directory / "readme.mjs").write_text(
                "import pg from 'pg';"
                "const client = new pg.Client({connectionString: process.argv[2]});"
                f"await client.connect(); {example(NODE).code} await client.end();"
            )
            project.run("node", str(node_directory / "readme.mjs"), database.dsn)
        finally:
            database.execute("DROP OWNED BY billing; DROP ROLE billing")
        orders.wait_count(6)
        assert [(event.type, event.data) for event in orders.events] == [
            ("paid", '{"order": 1}'),
            ("shipped", '{"order": 8}'),
            ("shipped", '{"order": 9}'),
            ("message", '{"text": "hello & <b>"}'),
            ("invoice-paid", '{"invoice": 7}'),
            ("invoice-paid", '{"invoice":7}'),
        ]
        printed = run_python(project, example(READ), after="print(later)")
        assert printed.startswith("orders:1 paid {'order': 1}\norders:2 shipped")
        assert "EventPage(events=[], last_event_id='orders:5'" in printed
    assert page.console == []


def test_manager_decides_and_a_revocation_ends_the_stream(
    project: Project, pushpin: Pushpin, app_port: int
) -> None:
    for words in (MANAGER, MANAGER_SETTING):
        add(project, example(words))
    migrate(project)
    project.serve(app_port)
    ann, cookie = log_in("ann")
    ann.groups.add(Group.objects.create(name="tea"))
    url, headers = f"{pushpin.url}/events/", {"Cookie": cookie}
    with SSEClient(url, ["tea"], headers=headers) as client, SSEClient(url, ["tea"]) as stranger:
        client.wait_open()
        assert stranger.ended.wait(20)
        assert stranger.control[0].type == "stream-error"
        run_python(
            project,
            example(REVOKE),
            before="from django.contrib.auth.models import Group, User;"
            "user = User.objects.get(); group = Group.objects.get()",
        )
        assert client.ended.wait(20)
        assert client.control[-1].type == "stream-error"
    assert User.objects.get().groups.count() == 0


def test_pages_of_other_origins_may_read(project: Project, pushpin: Pushpin, app_port: int) -> None:
    add(project, example(ORIGINS))
    migrate(project)
    project.serve(app_port)
    request = urllib.request.Request(
        f"{pushpin.url}/events/?channel=a", headers={"Origin": "https://shop.example"}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "https://shop.example"


def test_rest_framework(project: Project, pushpin: Pushpin, app_port: int, page: Page) -> None:
    add(project, example(API))
    project.write("myproject/settings.py", "\nINSTALLED_APPS += ['rest_framework']\n")
    project.write("myproject/urls.py", "urlpatterns += [path('api/', include('myproject.api'))]\n")
    migrate(project)
    project.serve(app_port)
    for path, channels in {
        "news/": ["news", "sport"],
        "orders/": ["orders"],
        "any/?channels=a,b": ["a", "b"],
        "any/a/": ["a"],
        "clock/": ["clock"],
    }.items():
        request = urllib.request.Request(f"{pushpin.url}/api/{path}")
        with urllib.request.urlopen(request, timeout=20) as response:
            opened = next(line.decode() for line in response if line.startswith(b"id:"))
        assert opened == "id: " + ",".join(f"{channel}:0" for channel in channels) + "\n"
    page.goto(f"{pushpin.url}/api/news/")
    page.wait_for("document.body.innerText.includes('headline')")


def test_worker_follows_from_its_checkpoint(project: Project) -> None:
    migrate(project)
    before = "from shop.models import *; Checkpoint.objects.get_or_create(name='orders')"
    after = "import asyncio\nasyncio.run(asyncio.wait_for(follow(), 3))"
    for n in range(2):
        sent = f"Order.objects.create().pay() # {n}"
        code = f"{before}\n{sent}\n{example(FOLLOW).code}\ntry:\n  {after.splitlines()[0]}\n"
        code += f"  {after.splitlines()[1]}\nexcept asyncio.TimeoutError: pass"
        assert project.manage("shell", "--no-imports", "-c", code) == f"paid {{'order': {n + 1}}}\n"


def test_tests_of_a_project(project: Project) -> None:
    add(project, example(TEST))
    add(project, example(STREAM_TEST))
    project.manage("test", "shop")


def test_service_runs_the_command_that_there_is(project: Project) -> None:
    unit = configparser.ConfigParser()
    unit.read_string(example(UNIT).code)
    program, script, *arguments = unit["Service"]["ExecStart"].split()
    assert (Path(program).name, Path(script).name) == ("python", "manage.py")
    migrate(project)
    assert project.manage(*arguments, "--once") == "0 events published.\n"


def test_several_proxies_are_what_the_publisher_publishes_to(project: Project) -> None:
    add(project, example(PROXIES))
    project.write("myproject/settings.py", "\ndel GRIP_URL\n")
    migrate(project)
    printed = project.manage(
        *("shell", "--no-imports", "-c"),
        "from pg_eventstream.publisher.daemon import Publisher;"
        "from pg_eventstream.postgres.connector import Database;"
        "print([proxy.name for proxy in Publisher(Database('default'))._proxies])",
    )
    assert printed == "['http://localhost:5561', 'https://api.fanout.io/realm/REALM']\n"


def test_development_without_a_proxy(
    project: Project, database: Database, app_port: int, page: Page
) -> None:
    add(project, example(DEVELOPMENT))
    project.write(
        "myproject/asgi.py",
        "from django.core.asgi import get_asgi_application\napplication = get_asgi_application()\n",
    )
    project.write(
        "myproject/settings.py",
        "\ndel GRIP_URL\nMIDDLEWARE.remove('django_grip.GripMiddleware')\n",
    )
    migrate(project)
    address = f"127.0.0.1:{app_port}"
    project.start("runserver", address, "--noreload", ready=lambda: accepts(app_port))
    page.goto(f"http://{address}/")
    database.send("room-1", '{"text": "hello"}')
    page.wait_for("document.body.textContent.includes('hello')")
    assert page.console == []


def test_events_in_a_database_of_their_own(project: Project, tmp_path: Path) -> None:
    project.write("myproject/settings.py", "\nBEFORE = DATABASES['default']\n")
    lite = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "lite.sqlite3")}
    project.write("myproject/settings.py", f"DATABASES['default'] = {lite!r}\n")
    add(project, example(SECOND_DATABASE))
    project.write("myproject/settings.py", "DATABASES['events'] = BEFORE\n")
    commands = [line.split()[2:] for line in example(MIGRATE).code.splitlines()]
    code = f"""
from django.core.management import call_command
from django.db import connections
from shop.models import Order
call_command("check", fail_level="WARNING", databases=["default", "events"])
for command in {commands}:
    call_command(*command, run_syncdb=len(command) == 1, verbosity=0)
print(*{{name.split("_")[0] for name in connections["default"].introspection.table_names()}})
Order.objects.create().pay()
call_command("eventstream_publisher", once=True)
"""
    printed = project.run(sys.executable, "-W", "error", "-m", "django", "shell", "-c", code)
    *_, names, published = printed.splitlines()
    assert {"shop", "auth"} <= set(names.split())
    assert "pg" not in names
    assert published == "1 events published."


def test_what_is_to_be_installed_exists(project: Project) -> None:
    for words in (INSTALL, INSTALL_DRF):
        project.environment["PIP_DRY_RUN"] = "1"
        out = project.run("sh", "-ec", example(words).code)
        assert "Requirement already satisfied: pg-eventstream" in out


def test_make_has_the_targets() -> None:
    for command in example("make demo").code.splitlines():
        line = command.partition("#")[0].split()
        subprocess.run([*line, "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=30)
