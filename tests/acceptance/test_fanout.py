"""Fanout Cloud, Fastly and Pushpin: authenticated publishing, signed requests, several proxies."""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from email.message import Message
from functools import partial
from http.server import BaseHTTPRequestHandler
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from django.test import Client, override_settings
from gripcontrol import parse_grip_uri

from pg_eventstream import send_event
from pg_eventstream.conf import conf
from pg_eventstream.grip.proxy import Proxy
from pg_eventstream.postgres.connector import Connector
from pg_eventstream.publisher.daemon import Publisher
from pg_eventstream.servers.processes import Process, accepts, free_port, wait_until
from pg_eventstream.servers.pushpin import Pushpin
from tests.support.database import Database
from tests.support.environment import DIRECTORY, KEY, child_environment
from tests.support.forked import ForkedProcess
from tests.support.http_service import HttpService, body_of, respond
from tests.support.origin import Origin
from tests.support.publisher import NewPublisher
from tests.support.sse_client import OpenStream, SSEClient

NewApplication = Callable[[int, dict[str, str]], None]

SECRET = bytes(range(150, 214))  # not text
TOKEN = "an-api-token"


class Cloud(HttpService):
    """A control endpoint that accepts what Fanout Cloud and Fastly accept, and nothing else.

    It accepts either tokens of an issuer, signed with a key, or one bearer token.
    """

    protocol = "HTTP/1.1"

    def __init__(self) -> None:
        super().__init__()
        self.path = ""
        """The path at which it accepts events."""
        self.keys: dict[str, bytes] = {}
        """The key of each issuer; without any, the bearer token counts."""
        self.token = TOKEN
        self.items: list[dict[str, Any]] = []
        self.refused: list[str] = []
        """Why each refused request was refused."""
        self.authorizations: list[str] = []

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        status, problem = self.judge(request.path, request.headers, body_of(request))
        if problem:
            self.refused.append(problem)
        respond(request, status, (problem or "Published").encode())

    def judge(self, path: str, headers: Message, body: bytes) -> tuple[int, str]:
        if path != f"{self.path}/publish/":
            return 404, f"no such path: {path}"
        authorization = headers.get("Authorization", "")
        self.authorizations.append(authorization)
        try:
            self._check_authorization(authorization)
        except (ValueError, KeyError, jwt.InvalidTokenError) as e:
            return 401, f"unauthorized: {e!r}"
        if headers.get("Content-Type") != "application/json":
            return 400, "not JSON"
        try:
            items = json.loads(body)["items"]
            for item in items:
                _check_item(item)
        except (ValueError, LookupError, AssertionError, TypeError) as e:
            return 400, f"bad body: {e!r}"
        self.items += items
        return 200, ""

    def _check_authorization(self, authorization: str) -> None:
        scheme, _, token = authorization.partition(" ")
        if scheme != "Bearer":
            raise ValueError(scheme)
        if not self.keys:
            if token != self.token:
                raise ValueError("another token")
            return
        issuer = jwt.decode(token, options={"verify_signature": False})["iss"]
        jwt.decode(
            token, self.keys[issuer], algorithms=["HS256"], options={"require": ["exp", "iss"]}
        )

    @property
    def ids(self) -> list[str | None]:
        return [item.get("id") for item in self.items]


def _check_item(item: dict[str, Any]) -> None:
    """Check the forms that Pushpin accepts (src/handler/publishitem.cpp)."""
    assert set(item) <= {"channel", "id", "prev-id", "formats", "meta"}
    assert item["channel"]
    assert isinstance(item["channel"], str)
    assert all(isinstance(item[name], str) for name in ("id", "prev-id") if name in item)
    assert all(isinstance(value, str) for value in item.get("meta", {}).values())
    (name, content), *others = item["formats"].items()
    assert (name, others) == ("http-stream", [])
    assert content == {"action": "hint"} or isinstance(content["content"], str)


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with Cloud() as server:
        yield server


@pytest.fixture
def new_application(database: Database) -> Iterator[NewApplication]:
    """Starts application servers on the loopback interface, and ends them with the test."""
    made: list[Process] = []

    def start(port: int, environment: dict[str, str]) -> None:
        program = [sys.executable, "-m", "uvicorn", "tests.project.asgi:application"]
        process = ForkedProcess(
            "the application server",
            [*program, f"--port={port}", "--log-level=warning"],
            log_path=DIRECTORY / f"app-{port}.log",
            environment=environment,
        )
        made.append(process)
        process.start(ready=lambda: accepts(port))

    yield start
    for process in made:
        process.stop(timeout=5)


def in_base64(key: bytes) -> str:
    return f"base64:{b64encode(key).decode()}"


# Publishing

FORMS: dict[str, tuple[str, dict[str, Any], str, dict[str, bytes]]] = {
    # The settings, their meaning, the path, and the issuers' keys if there are any
    "pushpin": (
        "http://HOST?key=an-api-token",
        {"control_uri": "http://HOST", "key": TOKEN},
        "",
        {},
    ),
    "pushpin, key in base64": (
        f"http://HOST/?key={in_base64(TOKEN.encode())}",
        {"control_uri": "http://HOST", "key": TOKEN.encode()},
        "",
        {},
    ),
    "fanout cloud": (
        f"http://HOST/realm/R?iss=R&key={in_base64(SECRET)}",
        {"control_uri": "http://HOST/realm/R", "control_iss": "R", "key": SECRET},
        "/realm/R",
        {"R": SECRET},
    ),
    "fanout cloud, key as text": (
        f"http://HOST/realm/R/?iss=R&key={KEY}",
        {"control_uri": "http://HOST/realm/R", "control_iss": "R", "key": KEY},
        "/realm/R",
        {"R": KEY.encode()},
    ),
    "fastly": (
        f"http://HOST/service/ID?key={TOKEN}&verify-iss=fastly:ID&verify-key={in_base64(SECRET)}",
        {
            "control_uri": "http://HOST/service/ID",
            "key": TOKEN,
            "verify_iss": "fastly:ID",
            "verify_key": SECRET,
        },
        "/service/ID",
        {},
    ),
}


@pytest.mark.timeout(60)  # refused events are repeated without end
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_grip_url_is_understood_and_published_to(
    database: Database, cloud: Cloud, form: str
) -> None:
    url, meaning, cloud.path, cloud.keys = FORMS[form]
    host = cloud.url.removeprefix("http://")
    url = url.replace("HOST", host)
    expected = {**meaning, "control_uri": meaning["control_uri"].replace("HOST", host)}
    send_event("a", "message", {"n": 1})
    send_event("a", "message", "two\nlines", skip_user_ids=["7"])
    send_event("a", "message", "x" * 500_000)  # is published as a hint
    for setting in ({"GRIP_URL": url}, {"GRIP_PROXIES": [parse_grip_uri(url)]}):
        with override_settings(**setting):
            assert conf.grip_proxies == [expected]
            Publisher(Connector("default")).run_once()
            send_event("a", "message", 4)
    assert cloud.refused == []
    # A hint is repeated, also by the next publisher, which cannot know that it was published.
    assert cloud.ids == ["1", "2", None, None, "4", None]
    assert {item["channel"] for item in cloud.items} == {"events-a"}


@override_settings(GRIP_VERIFY_KEY="of all")
def test_verify_key_is_every_proxys_that_has_none() -> None:
    proxies = [{"control_uri": "http://a"}, {"control_uri": "http://b", "verify_key": "own"}]
    with override_settings(GRIP_PROXIES=proxies, GRIP_URL="http://c?key=x"):
        found = conf.grip_proxies
    assert [proxy["verify_key"] for proxy in found] == ["of all", "own", "of all"]
    assert "verify_key" not in proxies[0]  # the setting is unchanged


def test_signed_token_is_renewed_before_it_expires(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.keys = {"R": SECRET}
    proxy = Proxy({"control_uri": cloud.url, "control_iss": "R", "key": SECRET})
    begin = time.time() - 590
    for seconds in range(0, 591, 10):
        monkeypatch.setattr(time, "time", partial(float, begin + seconds))
        proxy.authorization()
    # The first token would expire in 10 seconds, this one in 300 at least.
    monkeypatch.undo()
    with closing(proxy):
        proxy.post(b'{"items":[]}')
    assert cloud.refused == []
    token = cloud.authorizations[-1].split()[1]
    expires = jwt.decode(token, SECRET, algorithms=["HS256"])["exp"]
    assert 290 < expires - time.time() <= 3600


def test_events_wait_until_the_key_is_right_and_arrive_in_order(
    database: Database, cloud: Cloud, new_publisher: NewPublisher
) -> None:
    cloud.path, cloud.keys = "/realm/R", {"R": b"the key after it was changed, on one side only"}
    url = f"{cloud.url}/realm/R?iss=R&key={in_base64(SECRET)}"
    for n in range(1, 151):
        send_event("a", "message", n)
    publisher = new_publisher(PG_EVENTSTREAM_TEST_GRIP_URL=url).lead()
    publisher.wait_for_log("check iss and key in GRIP_URL")
    wait_until(lambda: len(cloud.refused) >= 3, timeout=20)
    assert publisher.running
    assert cloud.items == []
    assert database.value("SELECT position FROM pg_eventstream_proxy") == 0
    # The key cannot be read in the log.
    assert b64encode(SECRET).decode() not in publisher.log

    cloud.keys = {"R": SECRET}
    publisher.wait_for_log("takes events again")
    send_event("a", "message", 151)
    wait_until(lambda: len([i for i in cloud.ids if i]) >= 151, timeout=20)
    assert [i for i in cloud.ids if i] == [str(n) for n in range(1, 152)]


def test_events_go_to_pushpin_and_to_a_cloud_at_once(
    database: Database,
    cloud: Cloud,
    new_publisher: NewPublisher,
    pushpin: Pushpin,
    stream: OpenStream,
    channel: str,
) -> None:
    cloud.path = "/service/ID"
    fastly = f"{cloud.url}/service/ID?key={TOKEN}&verify-iss=fastly:ID&verify-key={KEY}"
    urls = f"{fastly} {pushpin.control_url}?key={KEY}"
    client = stream(channel).wait_open()
    publisher = new_publisher(PG_EVENTSTREAM_TEST_GRIP_URL=urls).lead()
    for n in range(1, 21):
        send_event(channel, "message", n)
    assert [event.data for event in client.wait_count(20)] == [str(n) for n in range(1, 21)]
    wait_until(lambda: len(cloud.items) >= 20, timeout=20)
    assert [(item["channel"], item["id"], item["prev-id"]) for item in cloud.items] == [
        (f"events-{channel}", str(n), str(n - 1)) for n in range(1, 21)
    ]
    assert cloud.refused == []
    assert publisher.running


def test_key_of_pushpin_may_be_bytes_that_are_no_text(
    database: Database,
    new_application: NewApplication,
    new_publisher: NewPublisher,
    channel: str,
) -> None:
    port, key = free_port(), in_base64(SECRET)
    with Pushpin(DIRECTORY / f"bytes-{channel}", origin=f"127.0.0.1:{port}", sig_key=key) as server:
        environment = child_environment(
            PG_EVENTSTREAM_TEST_GRIP_URL=f"{server.control_url}?key={key}"
        )
        new_application(port, environment)
        new_publisher(**environment).lead()
        with SSEClient(f"{server.url}/events/", [channel]) as client:
            client.wait_open()
            for n in range(1, 4):
                send_event(channel, "message", n)
                client.wait_count(n)
        # It was told, and did not only ask.
        position = "SELECT position FROM pg_eventstream_proxy"
        wait_until(lambda: bool(database.value(position) == 3), timeout=20)


# Signed requests


def _pem_pair(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> tuple[str, str]:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


EC_KEY, EC_PUBLIC = _pem_pair(ec.generate_private_key(ec.SECP256R1()))
RSA_KEY, RSA_PUBLIC = _pem_pair(rsa.generate_private_key(65537, 2048))
STRANGERS_KEY, _ = _pem_pair(ec.generate_private_key(ec.SECP256R1()))
API_TOKEN = "the API token of the service, long enough"


def fastly(public: str) -> dict[str, Any]:
    return {
        "control_uri": "https://api.fastly.com/service/ID",
        "key": API_TOKEN,
        "verify_iss": "fastly:ID",
        "verify_key": public,
    }


def signature(key: str, algorithm: str, **claims: Any) -> str:
    claims = {"iss": "fastly:ID", "exp": int(time.time()) + 60, **claims}
    return jwt.encode(
        {name: value for name, value in claims.items() if value is not None}, key, algorithm
    )


def confused_signature(secret: str, algorithm: str = "HS256") -> str:
    """A token that uses a public text as the secret; PyJWT would refuse to make it."""
    header = {"alg": algorithm, "typ": "JWT"}
    claims = {"iss": "fastly:ID", "exp": int(time.time()) + 60}
    parts = [jwt.utils.base64url_encode(json.dumps(part).encode()) for part in (header, claims)]

    digest = hmac.new(secret.encode(), b".".join(parts), hashlib.sha256).digest()
    parts.append(b"" if algorithm == "none" else jwt.utils.base64url_encode(digest))
    return b".".join(parts).decode()


@pytest.mark.parametrize(
    ("setting", "key", "algorithm"),
    [
        ({"GRIP_PROXIES": [fastly(EC_PUBLIC)]}, EC_KEY, "ES256"),
        ({"GRIP_PROXIES": [fastly(RSA_PUBLIC)]}, RSA_KEY, "RS256"),
        (
            {
                "GRIP_URL": "https://api.fastly.com/service/ID?key=x&verify-iss=fastly:ID"
                f"&verify-key={in_base64(EC_PUBLIC.encode())}"
            },
            EC_KEY,
            "ES256",
        ),
        (
            {
                "GRIP_URL": "https://api.fastly.com/service/ID?key=x&verify-iss=fastly:ID",
                "GRIP_VERIFY_KEY": f"\n{EC_PUBLIC}\n",
            },
            EC_KEY,
            "ES256",
        ),
    ],
)
def test_requests_that_fastly_signed_open_streams(
    database: Database, setting: dict[str, Any], key: str, algorithm: str
) -> None:
    send_event("c", "message", 1)
    database.value("SELECT pg_eventstream_sequence()")
    origin = Origin()
    with override_settings(**setting):
        headers = {"Grip-Sig": signature(key, algorithm)}
        answer = origin.ask("/events/?channel=c&lastEventId=c:0", headers)
        assert answer.held
        assert answer.data == ["1"]
        headers["Grip-Last"] = "events-c; last-id=0"
        assert origin.ask(answer.next_link, headers).data == ["1"]


FORGERIES: dict[str, Callable[[], str | None]] = {
    "none at all": lambda: None,
    "algorithm none": lambda: confused_signature("", "none"),
    "the public key as secret": lambda: confused_signature(EC_PUBLIC),
    "the stripped public key as secret": lambda: confused_signature(EC_PUBLIC.strip()),
    "the issuer as secret": lambda: confused_signature("fastly:ID"),
    "the token that publishes": lambda: signature(API_TOKEN, "HS256"),
    "a stranger's key": lambda: signature(STRANGERS_KEY, "ES256"),
    "another algorithm": lambda: signature(RSA_KEY, "RS256"),
    "another service": lambda: signature(EC_KEY, "ES256", iss="fastly:OTHER"),
    "no issuer": lambda: signature(EC_KEY, "ES256", iss=None),
    "expired": lambda: signature(EC_KEY, "ES256", exp=int(time.time()) - 1),
    "no end": lambda: signature(EC_KEY, "ES256", exp=None),
    "cut": lambda: signature(EC_KEY, "ES256")[:-4],
    "the key of the other proxy": lambda: signature("of another Pushpin " * 3, "HS256"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_request_that_no_configured_proxy_signed_gets_nothing(
    database: Database, forgery: str
) -> None:
    pushpin = {"control_uri": "http://localhost:5561", "key": KEY}
    send_event("secret", "message", "told")
    database.value("SELECT pg_eventstream_sequence()")
    with override_settings(GRIP_PROXIES=[fastly(EC_PUBLIC), pushpin]):
        link = Origin().ask("/events/?channel=secret").next_link
        headers = {
            "Grip-Last": "events-secret; last-id=0",
            "Grip-Feature": "status, session, link:next",
            "Last-Event-ID": "secret:0",
        }
        grip_sig = FORGERIES[forgery]()
        if grip_sig is not None:
            headers["Grip-Sig"] = grip_sig
        for path in ("/events/?channel=secret", link):
            response = Client().get(path, headers=headers)
            assert response.status_code == 501
            assert not any(name.startswith("Grip-") for name in response.headers)
            shown = f"{response.content.decode()} {response.headers}"
            assert "told" not in shown
            assert "secret" not in shown
            assert "next-" not in shown


# Several applications and one proxy

HOST_OF_B = "b.invalid"


@pytest.fixture
def other_database(database: Database) -> Iterator[Database]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    database.execute(f"CREATE DATABASE {name} TEMPLATE template_migrated")
    yield Database(database.postgres, name)
    database.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_applications_with_prefixes_share_a_proxy_and_no_event(
    database: Database,
    other_database: Database,
    new_application: NewApplication,
    new_publisher: NewPublisher,
    channel: str,
) -> None:
    ports = free_port(), free_port()
    # A second line in its routes file.
    origins = f"127.0.0.1:{ports[0]}\n{HOST_OF_B} 127.0.0.1:{ports[1]}"
    databases = (database, other_database)
    with (
        Pushpin(DIRECTORY / f"shared-{channel}", origin=origins, sig_key=KEY) as shared,
        ExitStack() as stack,
    ):
        clients: list[SSEClient] = []
        for name, its, port in zip("ab", databases, ports, strict=True):
            environment = child_environment(
                shared,
                PG_EVENTSTREAM_TEST_DSN=its.dsn,
                PG_EVENTSTREAM_TEST_SETTINGS=json.dumps({"GRIP_PREFIX": f"{name}-"}),
            )
            new_application(port, environment)
            new_publisher(**environment).lead()
            headers = {"Host": HOST_OF_B} if name == "b" else {}
            client = SSEClient(f"{shared.url}/events/", [channel], headers=headers)
            clients.append(stack.enter_context(client).wait_open())
        for n in range(20):
            for name, its in zip("ab", databases, strict=True):
                its.send(channel, f"{name}{n}")
        for name, client in zip("ab", clients, strict=True):
            received = client.wait_count(20)
            assert [event.data for event in received] == [f"{name}{n}" for n in range(20)]
            assert received[-1].eids == {channel: 20}
