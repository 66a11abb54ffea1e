"""The examples of the README, the quickstart, the guides and the reference run unchanged."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from django.contrib.auth.models import Group, User
from django.core import signing

from pg_eventstream.servers.processes import wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.browser import Page
from tests.support.database import Database
from tests.support.documentation import Example, example
from tests.support.origin import log_in
from tests.support.projects import ROOT, Project
from tests.support.reader import add, migrate, put_behind_pushpin, run_python
from tests.support.roles import psql
from tests.support.sse_client import SSEClient
from tests.support.way import begin_probes_anew

Serve = Callable[[], str]


def run_sql(database: Database, one: Example, user: str = "postgres") -> str:
    done = psql(database, "-v", "ON_ERROR_STOP=1", user=user, script=one.code)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def status_of(url: str, **headers: str) -> int:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


# README and quickstart. An example that both contain is one example.


def test_setup_page_and_senders_work_together(
    project: Project, database: Database, serve: Serve, page: Page
) -> None:
    printed = project.shell(example("docs/quickstart.md", "manage.py check").code)
    assert "no issues" in printed
    assert example("docs/quickstart.md", "manage.py runserver").code == (
        "python manage.py runserver\n"
    )
    url = serve()
    page.goto(f"{url}/")
    with (
        SSEClient(f"{url}/events/", ["orders", "room-1"]) as orders,
        SSEClient(f"{url}/rooms/1/events/") as room,
    ):
        orders.wait_open()
        room.wait_open()
        run_python(
            project,
            example("docs/quickstart.md", "order.paid = True"),
            before="from shop.models import Order\norder = Order.objects.create()",
        )
        run_sql(database, example("docs/quickstart.md", "Hello from SQL"))
        database.execute("CREATE TABLE invoice (id integer, paid boolean)")
        database.execute("INSERT INTO invoice VALUES (7, false)")
        run_sql(database, example("README.md", "UPDATE invoice"))
        orders.wait_count(4)
        assert [(event.type, event.data) for event in orders.events] == [
            ("paid", '{"order": 1}'),
            ("message", '{"text": "Order paid"}'),
            ("message", '{"text": "Hello from SQL"}'),
            ("invoice-paid", '{"invoice": 7}'),
        ]
        assert [event.data for event in room.wait_count(2)] == [
            '{"text": "Order paid"}',
            '{"text": "Hello from SQL"}',
        ]
    page.wait_for("document.body.textContent.includes('Order paidHello from SQL')")
    assert page.console == []


@pytest.mark.parametrize(
    "one",
    [
        example("docs/quickstart.md", "install pg-eventstream"),
        example("docs/how-to/django-rest-framework.md", "pip install"),
        example("README.md", "pg_eventstream.demo"),
    ],
    ids=["the package", "with DRF", "with the demo"],
)
def test_everything_to_install_exists(project: Project, one: Example) -> None:
    project.environment["PIP_DRY_RUN"] = "1"
    for line in one.code.splitlines():
        if line.startswith("pip "):
            out = project.run("sh", "-ec", line)
            assert "Requirement already satisfied: pg-eventstream" in out
        else:  # tests/acceptance/test_demo.py runs it
            assert line == "python -m pg_eventstream.demo"
            assert "--proxy" in project.run("sh", "-ec", f"{line} --help")


@pytest.mark.parametrize(
    "one",
    [example("README.md", "make demo"), example("CONTRIBUTING.md", "make quick")],
    ids=["README", "CONTRIBUTING"],
)
def test_make_has_the_targets(one: Example) -> None:
    for command in one.code.splitlines():
        line = command.partition("#")[0].split()
        subprocess.run([*line, "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=30)


def test_commands_show_that_it_works(project: Project, database: Database, serve: Serve) -> None:
    """As they are, and here with the address of this server and an end."""
    commands = example("README.md", "eventstream_status")
    status, doctor, tail = (line.partition("#")[0].strip() for line in commands.code.splitlines())
    url = serve()
    with SSEClient(f"{url}/events/", ["orders"]) as client:
        client.wait_open()
        database.send("orders")
        client.wait_count(1)
        assert "HEALTHY" in project.shell(status)
        doctor = f"{doctor} --through {url}/events/"
        assert "HEALTHY" in project.shell(doctor)
        tail = f"{tail} --since earliest | head -n 1"
        assert "orders:1" in project.shell(tail)


# Permissions


def test_manager_decides_and_a_revocation_ends_the_stream(
    project: Project, serve_behind_pushpin: Serve
) -> None:
    add(project, example("docs/how-to/permissions.md", "def is_channel_reliable"))
    add(project, example("docs/how-to/permissions.md", "EVENTSTREAM_CHANNELMANAGER_CLASS ="))
    url = f"{serve_behind_pushpin()}/events/"
    ann, cookie = log_in("ann")
    ann.groups.add(Group.objects.create(name="tea"))
    headers = {"Cookie": cookie}
    with SSEClient(url, ["tea"], headers=headers) as client, SSEClient(url, ["tea"]) as stranger:
        client.wait_open()
        assert stranger.ended.wait(20)
        assert stranger.control[0].type == "stream-error"
        run_python(
            project,
            example("docs/how-to/permissions.md", "user.groups.remove"),
            before="from django.contrib.auth.models import Group, User;"
            "user = User.objects.get(); group = Group.objects.get()",
        )
        assert client.ended.wait(20)
        assert client.control[-1].type == "stream-error"
    assert User.objects.get().groups.count() == 0


def test_view_names_the_channels(project: Project, database: Database, serve: Serve) -> None:
    add(project, example("docs/how-to/permissions.md", "def my_events"))
    project.write(
        "myproject/urls.py",
        "from myproject.views import my_events\nurlpatterns += [path('mine/', my_events)]\n",
    )
    url = serve()
    ann, cookie = log_in("ann")
    with SSEClient(f"{url}/mine/", headers={"Cookie": cookie}) as client:
        client.wait_open()
        database.send(f"user-{ann.pk}", "for ann")
        assert client.wait_count(1)[0].data == "for ann"


def test_token_stands_for_a_user_through_the_proxy(
    project: Project, database: Database, serve_behind_pushpin: Serve
) -> None:
    add(project, example("docs/how-to/permissions.md", "def get_user_for_request"))
    project.write(
        "myproject/settings.py",
        "\nEVENTSTREAM_CHANNELMANAGER_CLASS = 'myproject.tokens.ChannelManager'\n"
        "EVENTSTREAM_NEXT_LINK_TIMEOUT = 5\n",
    )
    url = f"{serve_behind_pushpin()}/events/"
    ann, _ = log_in("ann")
    tokens = {
        "hers": signing.dumps(ann.pk, salt="events"),
        "forged": signing.dumps(ann.pk, salt="other"),
        "nobody's": signing.dumps(ann.pk + 1, salt="events"),
    }
    clients = {
        whose: SSEClient(url, ["tea"], headers={"Authorization": f"Bearer {token}"})
        for whose, token in {**tokens, "none": ""}.items()
    }
    with clients["hers"] as hers:
        hers.wait_open()
        for whose in ("forged", "nobody's", "none"):
            with clients[whose] as other:
                assert other.ended.wait(20), whose
                assert other.control[0].type == "stream-error"
        database.send("tea", "for ann")
        assert hers.wait_count(1)[0].data == "for ann"


# Sending from SQL


def test_role_inserts_with_psql_node_and_a_trigger(
    database: Database, node_directory: Path
) -> None:
    database.execute("CREATE TABLE invoice (id integer, paid boolean)")
    database.execute("INSERT INTO invoice VALUES (7, false)")
    run_sql(database, example("docs/how-to/sending-from-sql.md", "CREATE ROLE billing"))
    try:
        database.execute("GRANT UPDATE, SELECT ON invoice TO billing")
        insert = example("docs/how-to/sending-from-sql.md", "BEGIN;\nUPDATE invoice")
        run_sql(database, insert, user="billing")
        code = example("docs/how-to/sending-from-sql.md", "client.query").code
        (node_directory / "example.mjs").write_text(
            "import pg from 'pg';"
            "const client = new pg.Client({connectionString: process.argv[2]});"
            f"await client.connect(); {code} await client.end();"
        )
        dsn = database.postgres.dsn(database.name, "billing")
        subprocess.run(["node", str(node_directory / "example.mjs"), dsn], check=True, timeout=60)
        run_sql(database, example("docs/how-to/sending-from-sql.md", "CREATE TRIGGER announce"))
        run_sql(database, insert, user="billing")
    finally:
        database.execute("DROP OWNED BY billing; DROP ROLE billing")
    assert database.fetch("SELECT channel, type, data FROM pg_eventstream_event ORDER BY id") == [
        ("orders", "invoice-paid", '{"invoice": 7}'),
        ("orders", "invoice-paid", '{"invoice":7}'),
        ("orders", "invoice-changed", '{"id": 7, "paid": true}'),
        ("orders", "invoice-paid", '{"invoice": 7}'),
    ]


# Reading


def test_pages_of_events_are_read(project: Project) -> None:
    migrate(project)
    printed = run_python(
        project,
        example("docs/how-to/reading.md", "page = get_events"),
        before="from shop.models import *; Order.objects.create().pay()\n"
        "from django.core.management import call_command\n"
        "call_command('eventstream_publisher', once=True, verbosity=0)",
        after="print(later)",
    )
    assert printed.endswith(
        "orders:1 paid {'order': 1}\n"
        "EventPage(events=[], last_event_id='orders:1', reset=[], more=False)\n"
    )


@pytest.mark.faults
@pytest.mark.thorough
def test_worker_follows_from_its_checkpoint(project: Project) -> None:
    add(project, example("docs/how-to/reading.md", "class Checkpoint"))
    migrate(project)
    before = "from shop.models import *; Checkpoint.objects.get_or_create(name='orders')"
    follow = example("docs/how-to/reading.md", "async def follow").code
    after = "import asyncio\ntry: asyncio.run(asyncio.wait_for(follow(), 3))"
    for n in range(2):
        code = f"{before}\nOrder.objects.create().pay() # {n}\n{follow}\n{after}\n"
        code += "except asyncio.TimeoutError: pass"
        assert project.manage("shell", "--no-imports", "-c", code) == f"paid {{'order': {n + 1}}}\n"


# Testing


def test_tests_of_a_project(project: Project) -> None:
    add(project, example("docs/how-to/testing.md", "OrderTest"))
    add(project, example("docs/how-to/testing.md", "StreamTest"))
    add(project, example("docs/how-to/testing.md", "InvoiceTest"))
    project.manage("test", "shop")


@pytest.mark.faults
@pytest.mark.thorough
def test_test_of_a_project_with_pytest(project: Project) -> None:
    add(project, example("docs/how-to/testing.md", "(sent_events)"))
    migrate(project)  # without pytest-django there is no test database
    project.write("conftest.py", "import django\n\ndjango.setup()\n")
    out = project.run(
        *(sys.executable, "-m", "pytest", "--rootdir=.", "-p", "no:cacheprovider"),
        *("-p", "no:randomly", "shop/test_orders.py"),
    )
    assert "1 passed" in out


# Other guides


def test_pages_of_other_origins_may_read(project: Project, serve: Serve, page: Page) -> None:
    add(project, example("docs/how-to/other-origins.md", "EVENTSTREAM_ALLOW_ORIGINS ="))
    url = serve()
    request = urllib.request.Request(
        f"{url}/events/?channel=a", headers={"Origin": "https://shop.example"}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "https://shop.example"
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
    page.goto(f"{url}/")
    code = example("docs/how-to/other-origins.md", "new ReconnectingEventSource").code
    assert page.evaluate(
        """async (code) => {
            const address = "/static/pg_eventstream/reconnecting-eventsource.mjs";
            const { ReconnectingEventSource } = await import(address);
            const make = new Function("ReconnectingEventSource", `${code} return events;`);
            const events = make(ReconnectingEventSource);
            events.close();
            return [events.url, events.withCredentials];
        }""",
        code,
    ) == ["https://api.example/events/?channel=news", True]


def test_rest_framework(project: Project, serve_behind_pushpin: Serve, page: Page) -> None:
    add(project, example("docs/how-to/django-rest-framework.md", "NewsViewSet("))
    project.write("myproject/settings.py", "\nINSTALLED_APPS += ['rest_framework']\n")
    project.write("myproject/urls.py", "urlpatterns += [path('api/', include('myproject.api'))]\n")
    url = f"{serve_behind_pushpin()}/api"
    for path, channels in {
        "news/": ["news", "sport"],
        "orders/": ["orders"],
        "any/?channels=a,b": ["a", "b"],
        "any/a/": ["a"],
        "clock/": ["clock"],
    }.items():
        with urllib.request.urlopen(f"{url}/{path}", timeout=20) as response:
            opened = next(line.decode() for line in response if line.startswith(b"id:"))
        assert opened == "id: " + ",".join(f"{channel}:0" for channel in channels) + "\n"
    page.goto(f"{url}/news/")
    page.wait_for("document.body.innerText.includes('headline')")


@pytest.mark.faults
@pytest.mark.thorough
def test_rest_framework_without_a_page(project: Project, serve: Serve) -> None:
    add(project, example("docs/how-to/django-rest-framework.md", "NewsViewSet("))
    add(project, example("docs/how-to/django-rest-framework.md", "DEFAULT_RENDERER_CLASSES"))
    project.write("myproject/settings.py", "\nINSTALLED_APPS += ['rest_framework']\n")
    project.write("myproject/urls.py", "urlpatterns += [path('api/', include('myproject.api'))]\n")
    url = f"{serve()}/api/news/"
    assert status_of(url, Accept="text/event-stream") == 200
    assert status_of(url, Accept="text/html") == 406


def test_htmx(project: Project, serve: Serve, page: Page, node_directory: Path) -> None:
    modules = node_directory / "node_modules"
    scripts = {"htmx.js": "htmx.org/dist/htmx.js", "sse.js": "htmx-ext-sse/dist/sse.js"}
    for name, path in scripts.items():
        project.write(f"shop/static/{name}", (modules / path).read_text(encoding="utf-8"))
    tags = "".join(f"<script src='/static/{name}'></script>" for name in scripts)
    (project.directory / "page.html").write_text(
        f"{tags}{example('docs/how-to/htmx.md', 'htmx.createEventSource').code}"
        """<script>
            const make = htmx.createEventSource;
            htmx.createEventSource = (url) => announced(make(url));
        </script>""" + ANNOUNCED
    )
    project.write("shop/templates/shop/order.html", "<b>Order {{ order.pk }}</b>\n")
    url = serve()
    page.goto(f"{url}/")
    page.wait_for("document.title === 'open'")
    run_python(
        project,
        example("docs/how-to/htmx.md", "render_to_string"),
        before="from shop.models import Order\norder = Order.objects.create()",
    )
    page.wait_for("document.querySelector('div > b')?.textContent === 'Order 1'")


@pytest.mark.faults
@pytest.mark.thorough
def test_development_in_a_project_that_has_apps(project: Project) -> None:
    text = (project.directory / "myproject/settings.py").read_text()
    (project.directory / "myproject/settings.py").write_text(
        re.sub(r"^(INSTALLED_APPS = )\[\"daphne\", (.*)\]$", r"\1[\2]", text, flags=re.MULTILINE)
    )
    assert "pg_eventstream.W006" in project.run(
        sys.executable, "-c", "import django; django.setup(); from django.core.checks import *;"
        "print(*run_checks())",
    )  # fmt: skip
    add(project, example("docs/how-to/without-a-proxy.md", 'INSTALLED_APPS = ["daphne"'))
    migrate(project)


@pytest.mark.faults
@pytest.mark.thorough
def test_events_in_a_database_of_their_own(project: Project, tmp_path: Path) -> None:
    project.write("myproject/settings.py", "\nBEFORE = DATABASES['default']\n")
    lite = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "lite.sqlite3")}
    project.write("myproject/settings.py", f"DATABASES['default'] = {lite!r}\n")
    add(project, example("docs/how-to/second-database.md", 'DATABASES["events"]'))
    project.write("myproject/settings.py", "DATABASES['events'] = BEFORE\n")
    migrations = example("docs/how-to/second-database.md", "manage.py migrate").code
    commands = [line.split()[2:] for line in migrations.splitlines()]
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
    assert published.startswith("1 events sequenced.")


@pytest.mark.faults
@pytest.mark.thorough
def test_what_stands_in_the_way_of_the_proxy_lets_it_through(
    project: Project, database: Database, serve_behind_pushpin: Serve
) -> None:
    """Login, a redirect to TLS, and a middleware that requires a header."""
    add(project, example("docs/how-to/tls-and-sub-paths.md", "def public_events"))
    add(project, example("docs/how-to/tls-and-sub-paths.md", "SECURE_REDIRECT_EXEMPT ="))
    add(project, example("docs/how-to/tls-and-sub-paths.md", "class TenantMiddleware"))
    project.write(
        "myproject/settings.py",
        "\nMIDDLEWARE = ['django.middleware.security.SecurityMiddleware', *MIDDLEWARE,"
        " 'django.contrib.auth.middleware.LoginRequiredMiddleware',"
        " 'myproject.middleware.TenantMiddleware']\n"
        "SECURE_SSL_REDIRECT = True\n"
        "SECURE_PROXY_SSL_HEADER = ('HTTP_X_CAME_BY', 'tls')\n"
        "EVENTSTREAM_NEXT_LINK_TIMEOUT = 5\n",
    )
    project.write(
        "myproject/urls.py",
        "from myproject.public import public_events\n"
        "urlpatterns += [path('public/', public_events)]\n",
    )
    url = serve_behind_pushpin()
    headers = {"X-Came-By": "tls", "X-Tenant": "a"}
    assert status_of(f"{url}/public/?channel=tea", **{"X-Came-By": "tls"}) == 403
    log = project.directory / "runserver.log"
    with SSEClient(f"{url}/public/", ["tea"], headers=headers) as client:
        client.wait_open()
        wait_until(lambda: "/events/next-" in log.read_text(), timeout=20)
        answers = re.findall(r"/events/next-\S+\D+(\d{3})", log.read_text())
        assert set(answers) == {"200"}
        database.send("tea", "still there")
        assert client.wait_count(1)[0].data == "still there"


# Reference


@pytest.mark.faults
@pytest.mark.thorough
def test_checks_are_run(project: Project) -> None:
    migrate(project)
    printed = project.shell(example("docs/reference/checks.md", "--database default").code)
    assert printed.count("no issues") == 2


def test_events_are_sent_from_the_shell(project: Project, database: Database) -> None:
    migrate(project)
    one = project.shell(example("docs/reference/commands.md", "eventstream_send room-1").code)
    many = project.shell(example("docs/reference/commands.md", "eventstream_send - <<").code)
    assert (one, many) == ("1 event sent.\n", "2 events sent.\n")
    sent = "SELECT channel, type, data, skip_user_ids, meta FROM pg_eventstream_event ORDER BY id"
    assert database.fetch(sent) == [
        ("room-1", "message", '{"text": "Hello"}', [], None),
        ("room-1", "joined", '{"name": "Ada"}', [], None),
        ("room-1", "message", '{"text": "Hello"}', ["7"], {"import": "2026-11"}),
    ]


def test_status_of_a_project_is_shown(project: Project) -> None:
    migrate(project)
    screen = project.shell(example("docs/production/diagnoses.md", "eventstream_status").code)
    assert screen.startswith("pg_eventstream ")
    assert ": HEALTHY " in screen.splitlines()[0]


@pytest.mark.faults
@pytest.mark.thorough
def test_doctor_of_a_project_finds_nothing(
    project: Project, database: Database, pushpin: Pushpin, app_port: int
) -> None:
    put_behind_pushpin(project)
    migrate(project)
    begin_probes_anew(database)
    project.serve(app_port)
    one = example("docs/production/diagnoses.md", "--through https")
    url = f"{pushpin.url}/events/"
    asked = one.code.replace("https://example.com/events/", url)
    assert "HEALTHY: " in project.shell(asked)


def test_two_phase_commit(database: Database) -> None:
    code = example("docs/reference/sql.md", "PREPARE TRANSACTION").code
    run_sql(database, Example("sql", code.replace("order-7", f"order-{database.name}")))
    assert database.value("SELECT pg_eventstream_sequence()") == 1


def test_grants_and_a_separate_schema(database: Database, project: Project) -> None:
    roles = {"billing": "sender", "web": "endpoint", "events": "publisher"}
    names = {name: f"{name}_{database.name}" for name in roles}
    for name in names.values():
        database.execute(f"CREATE ROLE {name}")
    try:
        command = example("docs/reference/sql.md", "psql -v sender=billing").code
        for name, real in names.items():
            command = command.replace(f"={name} ", f"={real} ")
        command = command.replace("migrations/", f"{ROOT}/migrations/")
        run_psql(project, database, command)
        allowed = "SELECT has_column_privilege(%s, 'pg_eventstream_event', 'channel', 'INSERT')"
        assert database.value(allowed, [names["billing"]])
        assert not database.value(allowed, [names["web"]])
        schema = example("docs/reference/sql.md", "CREATE SCHEMA events").code
        run_sql(database, Example("sql", schema.replace("billing", names["billing"])))
    finally:
        for name in names.values():
            database.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_files_of_sql_are_applied(database: Database, project: Project) -> None:
    (project.directory / "migrations").symlink_to(ROOT / "migrations")
    database.execute("CREATE SCHEMA fresh")
    command = example("docs/reference/sql.md", "for file in migrations").code
    project.environment["PGOPTIONS"] = "-c search_path=fresh"
    run_psql(project, database, command)
    assert database.value("SELECT to_regclass('fresh.pg_eventstream_cursor') IS NOT NULL")


def run_psql(project: Project, database: Database, command: str) -> None:
    programs = database.postgres.program("psql").parent
    project.environment["PATH"] = f"{programs}:{project.environment['PATH']}"
    project.run("sh", "-ec", f"{command}\n")


#: Makes a page show when its stream has begun: events sent from then on arrive.
ANNOUNCED = """<script>
    function announced(events) {
        events.addEventListener("stream-open", () => { document.title = "open"; });
        return events;
    }
</script>"""


@pytest.mark.parametrize(
    "one",
    [
        example("docs/reference/browser-client.md", "import { Reconnecting"),
        example("docs/reference/browser-client.md", "eventsource.js"),
    ],
    ids=["module", "classic script"],
)
def test_browser_client_is_loaded(
    project: Project, database: Database, serve: Serve, page: Page, one: Example
) -> None:
    code, _, end = one.code.rpartition("</script>")
    show = "announced(events).onmessage = (event) => document.body.append(event.data);"
    (project.directory / "page.html").write_text(f"<body>{ANNOUNCED}{code}{show}</script>{end}")
    url = serve()
    page.goto(f"{url}/")
    page.wait_for("document.title === 'open'")
    database.send("room-1", "arrived")
    page.wait_for("document.body.textContent.includes('arrived')")
    assert page.console == []
