"""``eventstream_doctor`` names what is broken on the way of an event, each broken for real."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from pg_eventstream.operate.doctor import probes
from pg_eventstream.servers.postgres import Postgres
from pg_eventstream.servers.processes import free_port, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.project import settings
from tests.support.copied import copied
from tests.support.database import Database, new_database
from tests.support.environment import DIRECTORY, KEY, child_environment
from tests.support.http_service import HttpService, respond
from tests.support.network import Network
from tests.support.terminal import Terminal
from tests.support.way import World, begin_probes_anew

LOGIN_REQUIRED = "django.contrib.auth.middleware.LoginRequiredMiddleware"
SECURITY = "django.middleware.security.SecurityMiddleware"


@pytest.fixture(scope="module")
def shared(postgres: Postgres, pushpin: Pushpin, app_port: int) -> Iterator[World]:
    """One world for all tests, because starting its processes takes longer than asking."""
    with new_database(postgres) as database:
        begin_probes_anew(database)
        world = World(database, pushpin, app_port)
        yield world
        world.stop_serving()
        world.stop_publishing()


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    shared.settings = {}
    with ExitStack() as stack:
        shared.stack = stack
        yield shared


class Closes(HttpService):
    """A server that closes connections without an answer."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        pass


class NotFound(HttpService):
    """A server that knows no path."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        respond(request, 404)


# Healthy


def test_healthy_behind_a_proxy(world: World) -> None:
    world.serve()
    world.publish()
    result = world.ask_doctor(f"--through={world.url}")
    assert result["findings"] == []
    assert result["proxied"] is True
    assert result["continued"] > 0
    assert result["resumed"] is True
    assert all(seconds is not None for seconds in result["seconds"].values())
    assert result["steady"]["received"] == result["steady"]["sent"] == 200
    assert result["steady"]["in_order"]
    report = world.database.value("SELECT content FROM pg_eventstream_report WHERE name = 'doctor'")
    assert (report["ok"], report["findings"]) == (True, [])
    assert set(report["seconds"]) == {"committed", "sequenced", "published", "received"}


def test_healthy_behind_nginx(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "COUNT", 25)
    world.serve()
    world.publish()
    through = world.nginx("proxy_buffering off; gzip off;")
    assert world.ask_doctor(f"--through={through}")["findings"] == []


# Broken


@dataclass
class Breakage:
    """What to break, what the doctor must find, and words of its advice."""

    break_it: Callable[[World], list[str]]
    code: str
    level: str
    advice: str
    is_slow: bool = False


def at(url: str) -> list[str]:
    return [f"--through={url}", "--timeout=3"]


def with_a_healthy_way(front: Callable[[World], str]) -> Callable[[World], list[str]]:
    """Break something in front of an application that works."""

    def break_it(world: World) -> list[str]:
        world.serve()
        world.publish()
        return at(front(world))

    return break_it


def with_application(kind: str = "asgi", **changed: Any) -> Callable[[World], list[str]]:
    """Break the settings of the application."""

    def break_it(world: World) -> list[str]:
        world.serve(kind, **changed)
        world.publish()
        return at(world.url)

    return break_it


def a_silent_server(world: World) -> str:
    listener = socket.create_server(("127.0.0.1", 0))
    world.stack.callback(listener.close)
    return f"http://127.0.0.1:{listener.getsockname()[1]}/events/"


def a_server_that_closes(world: World) -> str:
    return f"{world.stack.enter_context(Closes()).url}/events/"


def no_application(world: World) -> list[str]:
    world.stop_serving()
    return at(world.url)


def another_secret_key(world: World) -> list[str]:
    world.settings = {"SECRET_KEY": "the key of another environment, which is as long as ours"}
    return with_application()(world)


def another_database(world: World) -> list[str]:
    server = Database(world.database.postgres, "postgres")
    name = f"{world.database.name}_other"
    world.stop_serving()
    server.execute(f"CREATE DATABASE {name} TEMPLATE template_migrated")
    world.stack.callback(server.execute, f"DROP DATABASE {name} WITH (FORCE)")
    world.publish()
    databases = {"default": {**settings.DATABASES["default"], **connection_of(world, name)}}
    world.serve(DATABASES=databases)
    return at(world.url)


def connection_of(world: World, name: str) -> dict[str, str]:
    return {
        "NAME": name,
        "USER": "postgres",
        "HOST": "127.0.0.1",
        "PORT": str(world.database.postgres.port),
    }


def login_at_next_links(world: World) -> list[str]:
    middleware = [*settings.MIDDLEWARE, "tests.project.middleware.only_with_a_cookie"]
    return [*with_application(MIDDLEWARE=middleware)(world), "--header=Cookie: known=1"]


TLS: dict[str, Any] = {
    "MIDDLEWARE": [SECURITY, *settings.MIDDLEWARE],
    "SECURE_SSL_REDIRECT": True,
    "SECURE_PROXY_SSL_HEADER": ["HTTP_X_FORWARDED_PROTO", "https"],
}


def tls_redirect_at_next_links(world: World) -> list[str]:
    world.settings = {"SECURE_SSL_REDIRECT": True}
    return [*with_application(**TLS)(world), "--header=X-Forwarded-Proto: https"]


def a_prefix_that_is_removed(world: World) -> list[str]:
    app = f"127.0.0.1:{world.app_port}"
    world.serve()
    elsewhere = world.stack.enter_context(NotFound()).port
    proxy = world.proxy(origin=f"127.0.0.1:{elsewhere}\n*,path_beg=/api/,replace_beg=/ {app}")
    world.publish(pushpin=proxy)
    world.settings = {"GRIP_URL": f"{proxy.control_url}?key={KEY}"}
    return at(f"{proxy.url}/api/events/")


def no_publisher(world: World) -> list[str]:
    world.serve()
    world.stop_publishing()
    return at(world.url)


def another_prefix(world: World) -> list[str]:
    world.serve()
    world.publish(PG_EVENTSTREAM_TEST_SETTINGS=json.dumps({"GRIP_PREFIX": "staging-"}))
    return at(world.url)


def a_publisher_behind_a_pooler(world: World) -> list[str]:
    world.serve()
    world.publish(f"--dsn={world.pgbouncer()}")
    return [f"--through={world.url}", "--timeout=8"]


def a_publisher_to_another_proxy(world: World) -> list[str]:
    world.serve()
    world.publish(pushpin=world.proxy())
    return at(world.url)


def a_proxy_that_cannot_be_reached(world: World) -> list[str]:
    world.serve()
    url = f"http://127.0.0.1:{free_port()}"
    world.publish(PG_EVENTSTREAM_TEST_GRIP_URL=f"{url}?key={KEY}")
    world.settings = {"GRIP_URL": f"{url}?key={KEY}"}
    return at(world.url)


def a_suspended_publisher(world: World) -> list[str]:
    world.serve()
    world.publish()
    assert world.publisher is not None
    os.kill(world.publisher.pid, signal.SIGSTOP)
    world.stack.callback(world.stop_publishing)
    return at(world.url)


def a_control_port_that_hangs(world: World) -> list[str]:
    network = world.stack.enter_context(Network(world.pushpin.control_port))
    url = f"{network.url}?key={KEY}"
    network.deaf()
    world.serve()
    world.publish(PG_EVENTSTREAM_TEST_GRIP_URL=url)
    world.settings = {"GRIP_URL": url}
    return at(world.url)


def a_slow_control_port(world: World) -> list[str]:
    network = world.stack.enter_context(Network(world.pushpin.control_port))
    url = f"{network.url}?key={KEY}"
    world.serve()
    world.publish(PG_EVENTSTREAM_TEST_GRIP_URL=url)
    behind = """
        SELECT count(*) FROM pg_eventstream_stream
         WHERE position > (SELECT position FROM pg_eventstream_proxy WHERE name = %s)
    """
    # A new proxy gets the probes of earlier tests first.
    wait_until(lambda: world.database.value(behind, [network.url]) == 0, timeout=20)
    network.delay(1.2)
    world.settings = {"GRIP_URL": url}
    return [f"--through={world.url}", "--timeout=15"]


def a_way_around_the_proxy(world: World) -> list[str]:
    world.serve("wsgi")
    return at(f"http://127.0.0.1:{world.app_port}/events/")


def through_a_network(break_it: Callable[[Network], None]) -> Callable[[World], list[str]]:
    """Break the network between client and proxy."""

    def network(world: World) -> list[str]:
        broken = world.stack.enter_context(Network(world.pushpin.port))
        break_it(broken)
        world.serve()
        world.publish()
        return [f"--through={broken.url}/events/", "--timeout=8"]

    return network


def a_message_rate(world: World) -> list[str]:
    proxy = world.proxy(message_rate=2500)
    world.serve()
    world.publish(pushpin=proxy)
    world.settings = {"GRIP_URL": f"{proxy.control_url}?key={KEY}"}
    return [f"--through={proxy.url}/events/", "--timeout=5"]


BREAKAGES = {
    # Before there is a stream
    "nothing listens": Breakage(
        lambda world: at(f"http://127.0.0.1:{free_port()}/events/"),
        "not-reachable", "broken", "Start the server there",
    ),
    "the host is unknown": Breakage(
        lambda world: at("http://nowhere.invalid/events/"), "unknown-host", "broken", "DNS",
    ),
    "no TLS there": Breakage(
        lambda world: at(world.url.replace("http:", "https:")), "tls-error", "broken", "http://",
    ),
    "a server hangs": Breakage(
        lambda world: at(a_silent_server(world)), "no-answer", "broken", "hangs",
        is_slow=True,
    ),
    "a server closes": Breakage(
        lambda world: at(a_server_that_closes(world)), "connection-lost", "broken", "port",
    ),
    "another path": Breakage(
        with_a_healthy_way(lambda world: f"{world.pushpin.url}/event/"),
        "wrong-url", "broken", "--through URL",
    ),
    "a password in front": Breakage(
        with_a_healthy_way(lambda world: world.nginx('auth_basic "x"; auth_basic_user_file x;')),
        "access-refused", "broken", "--header",
    ),
    "refused in front": Breakage(
        with_a_healthy_way(lambda world: world.nginx("deny all;")),
        "access-refused", "broken", "--header",
    ),
    "redirected in front": Breakage(
        with_a_healthy_way(
            lambda world: world.nginx("return 301 https://example.com/events/;")
        ),
        "redirected", "broken", "https://",
    ),
    "nginx finds no proxy": Breakage(
        with_a_healthy_way(lambda world: world.nginx(to=f"http://127.0.0.1:{free_port()}")),
        "bad-gateway", "broken", "proxy_pass",
    ),
    "the application is down": Breakage(no_application, "bad-gateway", "broken", "routes"),
    "the application fails": Breakage(
        with_application(EVENTSTREAM_CHANNEL_LIMIT=0), "server-error", "broken", "log",
    ),
    # The stream
    "buffered": Breakage(
        with_a_healthy_way(
            lambda world: world.nginx("proxy_ignore_headers X-Accel-Buffering;", http="1.0")
        ),
        "buffered", "broken", "proxy_buffering off;",
    ),
    "compressed": Breakage(
        with_a_healthy_way(lambda world: world.nginx("gzip on;")),
        "compressed", "degraded", "gzip off;",
    ),
    "the query is removed": Breakage(
        with_a_healthy_way(lambda world: world.nginx("rewrite ^ /events/? break;")),
        "doctor-unknown", "broken", "query",
    ),
    "the last id is removed": Breakage(
        with_a_healthy_way(lambda world: world.nginx('proxy_set_header Last-Event-ID "";')),
        "not-resumed", "broken", "Last-Event-ID",
        is_slow=True,
    ),
    "closed too early": Breakage(
        with_a_healthy_way(lambda world: world.nginx("proxy_read_timeout 300ms;")),
        "stream-closed", "broken", "proxy_read_timeout 60s;",
    ),
    # The application
    "wrong key, ASGI": Breakage(
        with_application(GRIP_URL="http://127.0.0.1:1?key=another-key-that-is-long-enough-for-it"),
        "wrong-key", "broken", "sig_key",
    ),
    "wrong key, WSGI": Breakage(
        with_application(
            "wsgi", GRIP_URL="http://127.0.0.1:1?key=another-key-that-is-long-enough-for-it"
        ),
        "wrong-key", "broken", "sig_key",
    ),
    "no middleware": Breakage(
        with_application(MIDDLEWARE=settings.MIDDLEWARE[1:]),
        "no-grip-middleware", "broken", '"django_grip.GripMiddleware"',
    ),
    "another SECRET_KEY": Breakage(
        another_secret_key, "secret-key-differs", "broken", "SECRET_KEY",
    ),
    "a slow clock": Breakage(
        with_application(
            MIDDLEWARE=[*settings.MIDDLEWARE, "tests.project.middleware.with_a_slow_clock"]
        ),
        "clocks-differ", "broken", "NTP",
    ),
    "another database": Breakage(
        another_database, "another-database", "broken", "EVENTSTREAM_DATABASE",
    ),
    "a login is required": Breakage(
        with_application(MIDDLEWARE=[*settings.MIDDLEWARE, LOGIN_REQUIRED]),
        "redirected", "broken", "--header 'Cookie: sessionid=",
    ),
    "TLS is required": Breakage(
        with_application(**TLS), "redirected", "broken", "SECURE_PROXY_SSL_HEADER",
    ),
    "a login is required at next links": Breakage(
        login_at_next_links, "next-link-redirected", "broken", "pg_eventstream-next",
        is_slow=True,
    ),
    "TLS is required at next links": Breakage(
        tls_redirect_at_next_links, "next-link-redirected", "broken", "SECURE_REDIRECT_EXEMPT",
        is_slow=True,
    ),
    "a prefix is removed": Breakage(
        a_prefix_that_is_removed, "next-link-not-found", "broken", "FORCE_SCRIPT_NAME",
        is_slow=True,
    ),
    "503 at next links": Breakage(
        with_application(
            MIDDLEWARE=[*settings.MIDDLEWARE, "tests.project.middleware.busy_at_next_links"]
        ),
        "next-link-fails", "broken", "pg_eventstream.next_links",
        is_slow=True,
    ),
    "no GRIP_URL": Breakage(
        with_application(GRIP_URL=None), "no-grip-url", "broken", "Set GRIP_URL",
    ),
    "another issuer": Breakage(
        with_application(GRIP_URL=f"http://127.0.0.1:1?key={KEY}&verify-iss=another"),
        "wrong-issuer", "broken", "sig_iss",
    ),
    "not through the proxy": Breakage(
        a_way_around_the_proxy, "no-proxy", "broken", "proxy's address",
    ),
    # On the way
    "through another proxy": Breakage(
        with_a_healthy_way(lambda world: f"{world.proxy().url}/events/"),
        "not-received", "broken", "one of the proxies of GRIP_URL",
        is_slow=True,
    ),
    "what is sent is delayed": Breakage(
        through_a_network(lambda network: network.delay(1.5)),
        "buffered", "degraded", "CDNs",
        is_slow=True,
    ),
    "the connection breaks": Breakage(
        through_a_network(lambda network: network.cut_after(4000)), "lost", "broken", "logs",
        is_slow=True,
    ),
    "another last id": Breakage(
        with_a_healthy_way(
            lambda world: world.nginx('proxy_set_header Last-Event-ID "earliest";')
        ),
        "resumed-wrongly", "broken", "same version",
        is_slow=True,
    ),
    # The publisher
    "a suspended publisher": Breakage(
        a_suspended_publisher, "not-sequenced", "broken", "Start the publisher",
        is_slow=True,
    ),
    "a control port that hangs": Breakage(
        a_control_port_that_hangs, "not-published", "broken", "push_in_http_port",
        is_slow=True,
    ),
    "a slow control port": Breakage(
        a_slow_control_port, "late", "degraded", "log of the publisher",
        is_slow=True,
    ),
    "no publisher": Breakage(
        no_publisher, "publisher-gone", "broken", "manage.py eventstream_publisher",
        is_slow=True,
    ),
    "another GRIP_PREFIX": Breakage(
        another_prefix, "prefix-differs", "broken", "GRIP_PREFIX", is_slow=True,
    ),
    "a publisher behind a pooler": Breakage(
        a_publisher_behind_a_pooler, "publisher-without-listen", "degraded", "direct connection",
        is_slow=True,
    ),
    "a publisher to another proxy": Breakage(
        a_publisher_to_another_proxy, "proxy-not-served", "broken", "same GRIP_URL",
        is_slow=True,
    ),
    "a proxy that cannot be reached": Breakage(
        a_proxy_that_cannot_be_reached, "proxy-unreachable", "broken", "GRIP_URL",
        is_slow=True,
    ),
    "a message_rate before Pushpin 1.40": Breakage(
        a_message_rate, "message-rate", "degraded", "message_rate=0",
        is_slow=True,
    ),
}  # fmt: skip


SLOW = [pytest.mark.thorough, pytest.mark.faults]


@pytest.mark.parametrize(
    "which",
    [pytest.param(name, marks=SLOW if BREAKAGES[name].is_slow else ()) for name in BREAKAGES],
)
def test_breakage_is_named_with_what_to_change(
    world: World, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    breakage = BREAKAGES[which]
    if breakage.code != "message-rate":
        monkeypatch.setattr(probes, "COUNT", 25)
    arguments = breakage.break_it(world)
    result = world.ask_doctor(*arguments)
    if breakage.code == "message-rate":
        # On a busy machine, the publisher's batches can be more than 25 ms apart.
        for _ in range(3):
            if result["findings"]:
                break
            result = world.ask_doctor(*arguments)
    found = {finding["code"]: finding for finding in result["findings"]}
    assert breakage.code in found, json.dumps(result)
    assert found[breakage.code]["level"] == breakage.level
    assert breakage.advice in found[breakage.code]["remedy"]
    assert result["findings"][0]["level"] == result["verdict"]


# The database


def test_role_that_may_not_send(world: World) -> None:
    world.serve()
    world.publish()
    database = world.database
    database.execute("CREATE ROLE only_reads LOGIN")
    world.stack.callback(database.execute, "DROP OWNED BY only_reads; DROP ROLE only_reads")
    database.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO only_reads")
    dsn = database.postgres.dsn(database.name, "only_reads")
    done = world.run_doctor(*at(world.url), "--json", dsn=dsn)
    found = {finding["code"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 2
    assert "permission denied" in found["cannot-send"]["message"]


@pytest.mark.faults
@pytest.mark.thorough
def test_standby(world: World) -> None:
    world.serve()
    world.publish()
    standby = copied(
        world.database.postgres,
        DIRECTORY / f"{world.database.name}-standby",
        "--write-recovery-conf",
    )
    world.stack.callback(standby.stop, "immediate")
    done = world.run_doctor(*at(world.url), "--json", dsn=standby.dsn(world.database.name))
    assert done.returncode == 2
    assert "database-is-standby" in done.stdout
    assert "target_session_attrs" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--database=other"], "is not in DATABASES"),
        (["--through=events/"], "full URL"),
        (["--through=https://[::1/"], "full URL"),
    ],
)
def test_doctor_says_if_it_could_not_look(world: World, arguments: list[str], text: str) -> None:
    with pytest.raises(CommandError, match=text) as raised:
        call_command("eventstream_doctor", *arguments)
    assert raised.value.returncode == 3
    output = StringIO()
    with pytest.raises(SystemExit, match="3"):
        call_command("eventstream_doctor", "--json", *arguments, stdout=output)
    found = json.loads(output.getvalue())
    assert found["verdict"] == "unknown"
    assert text in found["error"]


def test_doctor_says_if_there_is_no_database(world: World) -> None:
    dsn = f"postgresql://postgres@127.0.0.1:{free_port()}/x"
    done = world.run_doctor(f"--through={world.url}", dsn=dsn)
    assert done.returncode == 3
    assert "Database: " in done.stderr
    assert "Traceback" not in done.stderr


# In a terminal


@pytest.mark.faults
@pytest.mark.thorough
def test_person_sees_each_step_and_what_to_do(world: World) -> None:
    world.serve()
    world.publish()
    environment = child_environment(world.pushpin)
    steps = [
        "opened", "continued", "committed", "sequenced", "published", "received", "80 a second",
        "resumed", "HEALTHY",
    ]  # fmt: skip
    with Terminal(
        "eventstream_doctor", f"--through={world.url}", environment=environment
    ) as terminal:
        assert terminal.wait() == 0, terminal.output
        places = [terminal.output.find(step) for step in steps]
    assert places == sorted(places)
    assert -1 not in places
    url = f"http://127.0.0.1:{free_port()}/events/"
    with Terminal("eventstream_doctor", f"--through={url}", environment=environment) as terminal:
        assert terminal.wait() == 2
        assert "BROKEN: not-reachable" in terminal.output
        assert "\x1b[" in terminal.output
        assert max(len(line) for line in terminal.lines) <= 80
