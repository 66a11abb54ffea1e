"""runserver_ngrok tells Fanout Cloud the address of the tunnel and serves the project."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import jwt
import pytest
from django.conf import settings
from django.core.management.base import CommandError
from django.test import override_settings

from pg_eventstream.servers.processes import Process, free_port, wait_until
from tests.support.database import Database
from tests.support.environment import KEY
from tests.support.forked import ForkedProcess
from tests.support.ngrok import Service, run, tunnel

SECRET = bytes(range(200, 232))


@pytest.fixture
def ngrok() -> Iterator[Service]:
    with Service() as service:
        service.body = json.dumps({"tunnels": [tunnel("https://1b2c.ngrok.example")]})
        yield service


@pytest.fixture
def cloud() -> Iterator[Service]:
    with Service() as service:
        yield service


def realm(cloud: Service) -> str:
    return f"{cloud.url}/realm/R?iss=R&key=base64:{b64encode(SECRET).decode()}"


NewServer = Callable[..., Process]


@pytest.fixture
def new_server(
    ngrok: Service, cloud: Service, database: Database, tmp_path: Path
) -> Iterator[NewServer]:
    """Creates servers with separate settings, and ends them with the test."""
    made: list[Process] = []
    (tmp_path / "own_settings.py").write_text("from tests.project.settings import *\n")

    def make(port: int, *arguments: str, grip_url: str = "") -> Process:
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "own_settings",
            "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}",
            "PYTHONUNBUFFERED": "1",
            "PG_EVENTSTREAM_TEST_GRIP_URL": grip_url or realm(cloud),
        }
        command = [sys.executable, "-m", "django", "runserver_ngrok", f"127.0.0.1:{port}"]
        made.append(
            ForkedProcess(
                "runserver_ngrok",
                [*command, f"--ngrok-api={ngrok.url}/api", *arguments],
                log_path=tmp_path / "runserver.log",
                environment=environment,
            )
        )
        return made[-1]

    yield make
    for process in made:
        process.kill()


def serves(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("OPTIONS", "/events/")
        return connection.getresponse().status == 204
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Served(Exception):
    """Raised instead of serving."""


@pytest.fixture(autouse=True)
def stop_before_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    from django.core.management.commands import runserver

    def serve(*args: Any, **kwargs: Any) -> None:
        raise Served

    monkeypatch.setattr(runserver.Command, "inner_run", serve)


def test_tunnel_becomes_the_origin_and_the_project_is_served(
    new_server: NewServer, ngrok: Service, cloud: Service, tmp_path: Path
) -> None:
    port = free_port()
    ngrok.body = json.dumps(
        {
            "tunnels": [
                tunnel("https://1b2c.ngrok.example", to=f"http://localhost:{port}"),
                tunnel("http://1b2c.ngrok.example:8080", to=f"localhost:{port}"),
                tunnel("tcp://0.tcp.ngrok.example:12345", to=f"localhost:{port}"),
                tunnel("https://elsewhere.ngrok.example", to="http://localhost:1"),
            ]
        }
    )
    new_server(port, "--noreload").start(ready=lambda: serves(port))
    assert ngrok.requests == [("GET", "/api/tunnels")]
    assert cloud.requests == [("POST", "/realm/R/http/default/")]
    assert cloud.forms == [
        {
            "ssl_host": "1b2c.ngrok.example",
            "ssl_port": "443",
            "host": "1b2c.ngrok.example",
            "port": "8080",
            "rewrite_host": "true",
            "over_http": "true",
        }
    ]
    assert cloud.headers[0]["Content-Type"] == "application/x-www-form-urlencoded"
    scheme, token = cloud.headers[0]["Authorization"].split()
    assert scheme == "Bearer"
    assert jwt.decode(token, SECRET, algorithms=["HS256"])["iss"] == "R"
    log = (tmp_path / "runserver.log").read_text()
    assert f"https://1b2c.ngrok.example is the origin of {cloud.url}/realm/R\n" in log
    assert "ALLOWED_HOSTS" not in log


@pytest.mark.faults
@pytest.mark.thorough
def test_origin_is_set_once_however_often_the_code_is_reloaded(
    new_server: NewServer, cloud: Service, tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "runserver.log"
    new_server(port).start(ready=lambda: serves(port))

    def starts() -> int:
        return log.read_text().count("development server at")  # Django 6.1 names WSGI, too

    def changed_and_started_again() -> bool:
        # More than once, because it does not notice changes before its first look.
        with (tmp_path / "own_settings.py").open("a") as own_settings:
            own_settings.write("# changed\n")
        return starts() > 1 and serves(port)

    wait_until(lambda: starts() == 1, timeout=30)
    wait_until(changed_and_started_again, timeout=60, check=1)
    assert len(cloud.requests) == 1


def test_any_tunnel_is_taken_if_none_leads_here(cloud: Service, ngrok: Service) -> None:
    """A web server can be between the tunnel and runserver."""
    ngrok.body = json.dumps({"tunnels": [tunnel("https://x.ngrok.example", to="localhost:80")]})
    with override_settings(GRIP_URL=realm(cloud)), pytest.raises(Served):
        run(ngrok, addrport="8001")
    assert cloud.forms[0]["ssl_host"] == "x.ngrok.example"


@override_settings(ALLOWED_HOSTS=["localhost"])
def test_host_that_django_would_refuse_is_pointed_out(ngrok: Service, cloud: Service) -> None:
    err = StringIO()
    with override_settings(GRIP_URL=realm(cloud)), pytest.raises(Served):
        run(ngrok, stderr=err)
    assert "Add '1b2c.ngrok.example' to ALLOWED_HOSTS" in err.getvalue()


def test_every_proxy_learns_of_the_tunnel(ngrok: Service, cloud: Service) -> None:
    with Service() as other:
        proxies = [{"control_uri": f"{s.url}/x", "key": "token"} for s in (cloud, other)]
        with override_settings(GRIP_PROXIES=proxies), pytest.raises(Served):
            run(ngrok)
        for service in (cloud, other):
            assert service.requests == [("POST", "/x/http/default/")]
            assert service.headers[0]["Authorization"] == "Bearer token"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, '{"tunnels": []}', "Start one: ngrok http 8000"),
        (200, json.dumps({"tunnels": [tunnel("tcp://x.example:1")]}), "no HTTP tunnel"),
        (200, "<html>", "is not ngrok"),
        (200, "[]", "is not ngrok"),
        (200, '{"tunnels": [{}]}', "is not ngrok"),
        (404, "Not Found", r"is not ngrok \(status 404\).*--ngrok-api"),
    ],
)
def test_answer_of_ngrok_without_a_tunnel_is_explained(
    ngrok: Service, cloud: Service, status: int, body: str, message: str
) -> None:
    ngrok.status, ngrok.body = status, body
    with override_settings(GRIP_URL=realm(cloud)), pytest.raises(CommandError, match=message):
        run(ngrok)
    assert cloud.requests == []


def test_ngrok_that_does_not_run_is_explained(new_server: NewServer, tmp_path: Path) -> None:
    server = new_server(8000, f"--ngrok-api=http://127.0.0.1:{free_port()}/api")
    server.start()
    assert server.wait(timeout=30) == 1
    log = (tmp_path / "runserver.log").read_text()
    assert "Start it first: ngrok http 8000" in log
    assert "Traceback" not in log


def test_missing_proxy_is_explained(ngrok: Service) -> None:
    with pytest.raises(CommandError, match="set GRIP_URL"):
        run(ngrok)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "Check iss and key"), (500, "500 no"), (302, "302 no"), (405, "only with Fanout Cloud")],
)
def test_proxy_that_refuses_is_explained(
    ngrok: Service, cloud: Service, status: int, message: str
) -> None:
    cloud.status, cloud.body = status, "no"
    with override_settings(GRIP_URL=realm(cloud)), pytest.raises(CommandError, match=message):
        run(ngrok)


def test_proxy_that_cannot_be_reached_is_explained(ngrok: Service) -> None:
    url = f"http://127.0.0.1:{free_port()}/realm/R?iss=R&key={KEY}"
    with override_settings(GRIP_URL=url), pytest.raises(CommandError, match="cannot be reached"):
        run(ngrok)


@pytest.mark.faults
@pytest.mark.thorough
def test_projects_own_runserver_is_what_runs() -> None:
    for apps, has_option in (
        (settings.INSTALLED_APPS, False),
        ([*settings.INSTALLED_APPS, "django.contrib.staticfiles"], True),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "django", "runserver_ngrok", "--help"],
            env={
                **os.environ,
                "PG_EVENTSTREAM_TEST_SETTINGS": json.dumps(
                    {"INSTALLED_APPS": apps, "STATIC_URL": "static/"}
                ),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert ("--nostatic" in done.stdout) is has_option
        assert "--ngrok-api" in done.stdout
