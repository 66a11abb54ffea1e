"""The examples of the pages on production run unchanged except for names, ports and keys."""

from __future__ import annotations

import configparser
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pg_eventstream.servers.processes import Process, accepts, free_port, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.documentation import ROOT, Example, example, text_of
from tests.support.environment import DIRECTORY
from tests.support.projects import Project
from tests.support.publisher import PublisherProcess
from tests.support.reader import add, migrate, put_behind_pushpin
from tests.support.roles import psql
from tests.support.sse_client import SSEClient

NewPublisher = Callable[..., PublisherProcess]


def rows(database: Database, one: Example) -> list[list[str]]:
    """The rows that psql prints for an example."""
    done = psql(database, "-v", "ON_ERROR_STOP=1", script=one.code)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split("|") for line in done.stdout.splitlines()]


def shell(project: Project, one: Example, *more: str, **instead: str) -> str:
    """Run a line of an example in the project's directory, with some words replaced."""
    project.write(
        "manage.py", "from django.core.management import *\nexecute_from_command_line()\n"
    )
    line = one.code.rstrip("\n")
    for old, new in instead.items():
        assert old in line
        line = line.replace(old, new)
    return project.run("sh", "-ec", " ".join([line, *more]))


def settings_with(project: Project, one: Example, instead: dict[str, str]) -> None:
    code = one.code
    for old, new in instead.items():
        assert old in code
        code = code.replace(old, new)
    add(project, Example(one.language, code))


def python(project: Project, code: str) -> str:
    return project.manage("shell", "--no-imports", "-c", code)


def ini(one: Example | Path) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.read_string(one.code if isinstance(one, Example) else one.read_text())
    return found


# publisher


def test_service_and_container_run_the_command_that_there_is(project: Project) -> None:
    unit = ini(example("docs/production/publisher.md", "ExecStart"))
    _, script, *arguments = unit["Service"]["ExecStart"].split()
    container = example("docs/production/publisher.md", "CMD").code
    command = json.loads(container.removeprefix("CMD "))
    assert command == ["python", Path(script).name, *arguments]
    migrate(project)
    put_behind_pushpin(project)
    assert project.manage(*arguments, "--once") == "0 events published.\n"


def test_publisher_logs_as_the_project_sets_it_up(project: Project) -> None:
    put_behind_pushpin(project)
    migrate(project)
    add(project, example("docs/production/publisher.md", "LOGGING"))
    log = project.directory / "publisher.log"
    publisher = PublisherProcess(log, project.environment, "--verbosity=0")
    try:
        publisher.lead()
    finally:
        publisher.kill()


def test_heartbeat_and_what_waits(database: Database, new_publisher: NewPublisher) -> None:
    publisher = new_publisher().lead()
    database.send("a")
    waiting = example("docs/production/publisher.md", "AS waiting")
    position = "SELECT max(position) FROM pg_eventstream_proxy"
    wait_until(lambda: database.value(position) == 1, timeout=20)
    assert [count for _, count in rows(database, waiting)] == ["0"]
    ((name, *_),) = rows(database, example("docs/production/publisher.md", "silent_for"))
    assert name.endswith(f":{publisher.pid}")
    publisher.kill()
    database.send("a")
    database.execute("SELECT pg_eventstream_sequence()")
    assert [count for _, count in rows(database, waiting)] == ["1"]


# pushpin


def test_pushpin_has_the_settings_and_shares_its_key(project: Project, pushpin: Pushpin) -> None:
    ours = ini(example("docs/production/pushpin.md", "sig_key"))
    real = ini(pushpin.directory / "pushpin.conf")
    for section in ours.sections():
        assert set(ours[section]) <= set(real[section]), section
    assert ours["handler"]["message_rate"] == real["handler"]["message_rate"] == "0"
    add(project, example("docs/production/pushpin.md", "MIDDLEWARE"))
    migrate(project)
    printed = python(
        project, "from pg_eventstream.conf import conf; print(*conf.grip_proxies[0].values())"
    )
    handler = ours["handler"]
    address = f"http://localhost:{handler['push_in_http_port']}"
    assert set(printed.split()) == {address, ours["proxy"]["sig_key"]}


# fanout-and-fastly


@pytest.mark.parametrize(
    ("one", "proxies"),
    [
        (
            example("docs/production/fanout-and-fastly.md", '\nGRIP_URL = "https://api.fanout'),
            ["https://api.fanout.io/realm/REALM"],
        ),
        (
            example("docs/production/fanout-and-fastly.md", "GRIP_VERIFY_KEY"),
            ["https://api.fastly.com/service/ID"],
        ),
        (
            example("docs/production/fanout-and-fastly.md", "GRIP_PROXIES"),
            ["http://localhost:5561", "https://api.fanout.io/realm/REALM"],
        ),
    ],
    ids=["Fanout Cloud", "Fastly", "several"],
)
def test_proxies_are_those_that_are_published_to(
    project: Project, one: Example, proxies: list[str]
) -> None:
    project.write(
        "myproject/settings.py",
        '\nMIDDLEWARE = ["django_grip.GripMiddleware", *MIDDLEWARE]\n',
    )
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()
    add(project, Example(one.language, one.code.replace("...", "".join(pem.splitlines()[1:-1]))))
    add(project, example("docs/production/fanout-and-fastly.md", "GRIP_PREFIX"))
    migrate(project)
    printed = python(
        project,
        "from pg_eventstream.conf import conf, proxy_name;"
        "print(conf.grip_prefix, *map(proxy_name, conf.grip_proxies))",
    )
    assert printed.split() == ["shop-", *proxies]


def test_extra_for_fastly_exists(project: Project) -> None:
    project.environment["PIP_DRY_RUN"] = "1"
    printed = shell(project, example("docs/production/fanout-and-fastly.md", "pip install"))
    assert "Requirement already satisfied: pg-eventstream" in printed


# network


def test_nginx_in_front_passes_each_event_on(
    app: Process, pushpin: Pushpin, database: Database, new_publisher: NewPublisher, channel: str
) -> None:
    new_publisher().lead()
    location = example("docs/production/network.md", "location").code
    assert location.count(":7999") == 1
    location = location.replace(":7999", f":{pushpin.port}")
    port = free_port()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {kind}; " for kind in kinds)
    with configured("nginx", f"""
        daemon off; pid nginx.pid; error_log stderr;
        events {{}}
        http {{
            access_log off; {temporary}
            gzip on; gzip_types *; gzip_min_length 1;
            server {{ listen 127.0.0.1:{port}; {location} }}
        }}
    """, lambda file: ["nginx", "-p", file.parent, "-c", file], port):  # fmt: skip
        headers = {"Accept-Encoding": "gzip"}
        url = f"http://127.0.0.1:{port}/events/"
        with SSEClient(url, [channel], headers=headers) as client:
            client.wait_open()
            for n in range(3):
                database.send(channel, str(n))
                # Earlier than the next keep-alive, which would push out what is held back.
                client.wait_count(n + 1, timeout=10)


@contextmanager
def configured(
    name: str, text: str, command: Callable[[Path], list[str | Path]], port: int
) -> Iterator[None]:
    """Run a server with this configuration."""
    directory = DIRECTORY / f"{name}-{port}"
    directory.mkdir()
    directory.chmod(0o777)
    file = directory / "configuration"
    file.write_text(text)
    process = Process(
        name,
        command(file),
        log_path=directory / "log",
        user="nobody" if os.geteuid() == 0 else None,
    )
    process.start(ready=lambda: accepts(port))
    try:
        yield
    finally:
        process.stop()


# poolers


@pytest.mark.faults
@pytest.mark.thorough
def test_publisher_goes_past_the_pooler(project: Project, database: Database) -> None:
    configuration = example("docs/production/poolers.md", "pool_mode").code
    port, real = free_port(), str(database.postgres.port)
    configuration = (
        configuration.replace("app =", f"{database.name} = user=postgres")
        .replace("5432", real)
        .replace("6432", str(port))
    )
    configuration += "auth_type = any\nunix_socket_dir =\n"
    put_behind_pushpin(project)
    settings_with(
        project,
        example("docs/production/poolers.md", "MIRROR"),
        {"5432": real, "6432": str(port)},
    )
    with configured("pgbouncer", configuration, lambda file: ["pgbouncer", file], port):
        migrate(project)
        python(project, "from shop.models import Order; Order.objects.create().pay()")
        publisher = example("docs/production/poolers.md", "--database direct")
        done = shell(project, publisher, "--once")
        assert done == "1 events published.\n"
        through = project.manage("eventstream_publisher", "--once")  # reports it, and works
        assert through == "0 events published.\n"
        project.manage("test", "shop")


def test_message_of_a_publisher_at_a_pooler_is_the_real_one() -> None:
    (quoted,) = re.findall(r"```text\n(LISTEN .*)\n```", text_of("docs/production/poolers.md"))
    source = (ROOT / "pg_eventstream/postgres/listener.py").read_text(encoding="utf-8")
    said = "".join(re.findall(r'^\s+"(.*)"', source, re.MULTILINE))
    assert quoted.replace("100 ms", "%d ms") in said


# failover


@pytest.mark.faults
@pytest.mark.thorough
def test_primary_is_found_among_several_hosts(project: Project, database: Database) -> None:
    nobody, real = str(free_port()), str(database.postgres.port)
    put_behind_pushpin(project)
    migrate(project)
    done = shell(
        project,
        example("docs/production/failover.md", "--dsn"),
        "--once",
        **{
            "db1,db2": f"127.0.0.1,127.0.0.1 port={nobody},{real} user=postgres",
            "dbname=app": f"dbname={database.name}",
        },
    )
    assert done == "0 events published.\n"
    settings_with(
        project,
        example("docs/production/failover.md", 'target_session_attrs"'),
        {"db1,db2": "127.0.0.1,127.0.0.1"},
    )
    project.write("myproject/settings.py", f'\nDATABASES["default"]["PORT"] = "{nobody},{real}"\n')
    checked = shell(project, example("docs/production/failover.md", "check --database"))
    assert "no issues" in checked


# sizing


def test_sessions_are_as_many_as_the_page_says(
    database: Database, new_publisher: NewPublisher, pushpin: Pushpin
) -> None:
    new_publisher().lead()
    sessions = example("docs/production/sizing.md", "LIKE 'pg_eventstream %'")
    found = wait_until_stable(lambda: rows(database, sessions), 4)
    assert dict(found) == {
        f"pg_eventstream {role}": "1"
        for role in ("bell", f"feed {pushpin.control_url}", "leader", "prune")
    }
    assert "| publisher that leads | 3, and 1 for each proxy |" in text_of(
        "docs/production/sizing.md"
    )


def wait_until_stable(read: Callable[[], list[list[str]]], count: int) -> list[list[str]]:
    wait_until(lambda: len(read()) == count, timeout=20)
    return read()


@pytest.mark.parametrize("data", [200, 500])
def test_disk_is_what_the_page_says(data: int, database: Database) -> None:
    said = re.search(r"An event takes about (\d+) bytes", text_of("docs/production/sizing.md"))
    assert said
    events = 20_000
    for _ in range(10):
        database.execute(
            "INSERT INTO pg_eventstream_event (channel, data)"
            " SELECT 'channel-' || mod(n, 100), repeat('x', %s) FROM generate_series(1, %s) AS n",
            [data, events // 10],
        )
        database.execute("SELECT pg_eventstream_sequence()")
    taken = database.value(
        "SELECT sum(pg_total_relation_size(t::regclass)) FROM unnest(%s::text[]) AS t",
        [["pg_eventstream_event", "pg_eventstream_stream"]],
    )
    assert abs(taken / events - data - int(said[1])) < 0.15 * int(said[1])
    sizes = rows(database, example("docs/production/sizing.md", "pg_total_relation_size"))
    assert sizes[0][0] == "pg_eventstream_event"
    ((_, counted),) = rows(database, example("docs/production/sizing.md", "AS oldest"))
    assert counted == str(events)


def test_session_that_holds_a_snapshot_is_found(database: Database) -> None:
    held = example("docs/production/sizing.md", "backend_xmin")
    with database.connect(autocommit=False, application_name="a report") as report:
        report.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        report.execute("SELECT 1")
        pid, name, *_ = rows(database, held)[0]
        assert (pid, name) == (str(report.info.backend_pid), "a report")
    queue = rows(database, example("docs/production/sizing.md", "pg_notification_queue_usage"))
    assert queue == [["0"]]


# troubleshooting


@pytest.mark.faults
@pytest.mark.thorough
def test_an_event_is_followed_to_where_it_is(
    project: Project, database: Database, pushpin: Pushpin, app_port: int
) -> None:
    state = example("docs/production/troubleshooting.md", "'not seen by the trigger'")
    waiting = example("docs/production/troubleshooting.md", "AS waiting")
    put_behind_pushpin(project)
    migrate(project)
    checks = example("docs/production/troubleshooting.md", "manage.py check\n")
    assert shell(project, checks).count("no issues") == 2
    database.send("orders", "sequenced")
    database.execute("SELECT pg_eventstream_sequence()")
    database.send("orders", "waits")
    with database.connect() as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("INSERT INTO pg_eventstream_event (channel, data) VALUES ('orders', '')")
    assert [found[4] for found in rows(database, state)] == [
        "not seen by the trigger",
        "waits to be sequenced",
        "sequenced",
    ]
    assert [count for count, _ in rows(database, waiting)] == ["1"]

    project.serve(app_port)
    wait_until(lambda: rows(database, waiting)[0][0] == "0", timeout=20)
    position = example("docs/production/troubleshooting.md", "SELECT name, position")
    wait_until(lambda: rows(database, position) == [[pushpin.control_url, "2"]], timeout=20)
    curl = example("docs/production/troubleshooting.md", "curl")
    line = curl.code.rstrip("\n")
    for old, new in {"localhost:7999": f"127.0.0.1:{pushpin.port}", "time 30": "time 2"}.items():
        assert old in line
        line = line.replace(old, new)
    done = project.run("sh", "-c", f"{line} || true")  # timeout has ended it
    assert "event: stream-open" in done


def test_events_in_an_admin_site_of_the_project(project: Project) -> None:
    add(project, example("docs/production/admin.md", "class OperatorsSite"))
    project.write(
        "myproject/settings.py",
        """
INSTALLED_APPS += ["django.contrib.admin", "django.contrib.messages"]
MIDDLEWARE += ["django.contrib.messages.middleware.MessageMiddleware"]
TEMPLATES[0]["OPTIONS"] = {"context_processors": [
    "django.template.context_processors.request",
    "django.contrib.auth.context_processors.auth",
    "django.contrib.messages.context_processors.messages",
]}
""",
    )
    project.write(
        "myproject/urls.py",
        "from django.contrib import admin\n"
        "urlpatterns += [path('admin/', admin.site.urls)]\n"
        "from myproject.admin import operators\n"
        "urlpatterns += [path('operators/', operators.urls)]\n",
    )
    migrate(project)
    code = """
from django.contrib.auth.models import User
from django.test import Client
client = Client(SERVER_NAME="localhost")
client.force_login(User.objects.create_superuser("ada"))
for site in ("operators", "admin"):
    page = client.get(f"/{site}/pg_eventstream/event/")
    print(site, page.status_code, "Operators" in page.content.decode())
"""
    printed = project.manage("shell", "--no-imports", "-c", code)
    assert printed.splitlines() == ["operators 200 True", "admin 200 False"]


def test_log_as_json(project: Project) -> None:
    add(project, example("docs/production/logging.md", "class JsonFormatter"))
    add(project, example("docs/production/logging.md", "myproject.logs.JsonFormatter"))
    migrate(project)
    log = project.directory / "eventstream_publisher.log"
    project.start("eventstream_publisher", ready=lambda: "publisher-leading" in log.read_text())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (leading,) = (line for line in lines if line["event"] == "publisher-leading")
    (text,) = re.findall(r"^\{.*\}$", text_of("docs/production/logging.md"), re.MULTILINE)
    shown = json.loads(text)
    assert leading.keys() == shown.keys()
    name = leading["publisher"]
    assert leading["message"] == shown["message"].replace(shown["publisher"], name)
    assert leading["logger"] == shown["logger"]
    assert re.fullmatch(r"[-\d]+T[:\d]+[-+]\d{4}", leading["time"])
