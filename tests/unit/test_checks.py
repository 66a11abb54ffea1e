"""System checks: every wrong setting is reported with its remedy; a correct project is silent."""

from __future__ import annotations

import inspect
import os
import re
import sys
from base64 import b64encode
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, registry, run_checks
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from pg_eventstream.channelmanager import DefaultChannelManager
from pg_eventstream.checks import proxies
from pg_eventstream.checks import settings as checks
from pg_eventstream.conf import conf
from tests.support import forked

ROOT = Path(__file__).parents[2]
# The minimum length of a key for HS256.
SECRET = "a secret of thirty-two characters"
PROXY = {"control_uri": "http://localhost:5561", "key": SECRET.encode()}
# A key like the one that Fastly publishes for all services.
PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE12NUd9d8F0ZJLl4SjLNKXrxGSezt
Rbizbp3YBLq2NC66tZPoJEzbq0dFpXKldDTE2ICnwdIW302xBZnXmocmuQ==
-----END PUBLIC KEY-----"""
BASE64_KEY = b64encode(PUBLIC_KEY.encode()).decode()
JSON_WEB_KEY = '{"kty": "EC", "crv": "P-256", "x": "CKo5", "y": "7gwJ"}'
FASTLY = "https://api.fastly.com/service/ID?key=token&verify-iss=fastly:ID"
SECURE = ["django_grip.GripMiddleware", "django.middleware.security.SecurityMiddleware"]
TLS = {"SECURE_SSL_REDIRECT": True, "GRIP_PROXIES": [PROXY], "MIDDLEWARE": SECURE}
OWN_MANAGER = "tests.unit.test_checks.OwnChannelManager"
NO_MANAGER = "tests.unit.test_checks.NoChannelManager"


class OwnChannelManager(DefaultChannelManager):
    pass


class NoChannelManager:
    pass


def check(**overrides: Any) -> list[CheckMessage]:
    """The messages of ``manage.py check`` about this app, with these settings."""
    with override_settings(**overrides):
        return [m for m in run_checks() if str(m.id).startswith("pg_eventstream.")]


@pytest.mark.parametrize(
    "correct",
    [
        {},
        {"GRIP_URL": f"http://localhost:5561?key={SECRET}"},
        {"GRIP_PROXIES": [PROXY]},
        {"GRIP_PROXIES": [PROXY, {**PROXY, "control_uri": "https://api.example/realm"}]},
        {"GRIP_PROXIES": [{**PROXY, "verify_key": b"another secret of thirty-two characters"}]},
        {"GRIP_PROXIES": [{**PROXY, "verify_key": PUBLIC_KEY, "verify_iss": "fastly:ID"}]},
        {"GRIP_URL": FASTLY, "GRIP_VERIFY_KEY": PUBLIC_KEY},
        {"GRIP_URL": FASTLY, "GRIP_VERIFY_KEY": PUBLIC_KEY.encode()},
        {"GRIP_URL": f"{FASTLY}&verify-key=base64:{BASE64_KEY}"},
        {"GRIP_URL": f"https://api.fanout.io/realm/R?iss=R&key=base64:{BASE64_KEY}"},
        {"GRIP_PROXIES": [], "MIDDLEWARE": []},
        {"EVENTSTREAM_DATABASE": "default"},
        {"EVENTSTREAM_RETENTION": timedelta(minutes=5)},
        {"EVENTSTREAM_RETENTION": 3600},
        {"EVENTSTREAM_RETENTION": 0.5},
        {"EVENTSTREAM_RETENTION": None},
        {"EVENTSTREAM_RETENTION": None, "EVENTSTREAM_REPLAY_AGE": 3600},
        {"EVENTSTREAM_RETENTION": 600, "GRIP_PROXIES": [PROXY]},
        {"EVENTSTREAM_RETENTION": None, "GRIP_PROXIES": [PROXY]},
        {"EVENTSTREAM_REPLAY_AGE": None},
        {"EVENTSTREAM_REPLAY_AGE": 600},
        {"EVENTSTREAM_REPLAY_AGE": timedelta(hours=1)},
        {"EVENTSTREAM_CHANNEL_LIMIT": 1},
        {"EVENTSTREAM_CHANNEL_LIMIT": 19},
        {"EVENTSTREAM_NEXT_LINK_TIMEOUT": 5},
        {"EVENTSTREAM_SAFETY_POLL": None},
        {"EVENTSTREAM_SAFETY_POLL": 0.1},
        {"EVENTSTREAM_SAFETY_POLL": 60},
        {"EVENTSTREAM_CHANNELMANAGER_CLASS": OWN_MANAGER},
        {"EVENTSTREAM_ALLOW_ORIGIN": "https://example.com"},
        {"EVENTSTREAM_ALLOW_ORIGIN": "*"},
        {"EVENTSTREAM_ALLOW_ORIGINS": "http://localhost:3000"},
        {"EVENTSTREAM_ALLOW_ORIGINS": ["https://Example.com:8443", "http://[::1]:80443"]},
        {"EVENTSTREAM_ALLOW_ORIGINS": ("capacitor://localhost", "https://xn--bcher-kva.example")},
        {"EVENTSTREAM_ALLOW_ORIGINS": [], "EVENTSTREAM_ALLOW_CREDENTIALS": True},
        {"EVENTSTREAM_ALLOW_ORIGIN": "https://a.example", "EVENTSTREAM_ALLOW_CREDENTIALS": True},
        {"EVENTSTREAM_ALLOW_HEADERS": "Authorization, X-Requested-With"},
        {"EVENTSTREAM_ALLOW_HEADERS": ["Authorization"]},
        {"EVENTSTREAM_ALLOW_HEADERS": "*"},
        {"EVENTSTREAM_STORAGE_CLASS": None},
        {"SECURE_SSL_REDIRECT": True, "MIDDLEWARE": SECURE},
        {"SECURE_SSL_REDIRECT": True, "GRIP_PROXIES": [PROXY]},
        {**TLS, "SECURE_REDIRECT_EXEMPT": [r"(^|/)next[-/]"]},
        {**TLS, "SECURE_REDIRECT_EXEMPT": [r"^health/$", r"^events/"]},
        {**TLS, "SECURE_REDIRECT_EXEMPT": [re.compile(r"^rooms/\w+/next-")]},
    ],
)
def test_correct_project_is_silent(correct: dict[str, Any]) -> None:
    assert check(**correct) == []


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("E001", {"EVENTSTREAM_DATABASE": "elsewhere"}),
    ("E003", {"EVENTSTREAM_RETENTION": "24h"}),
    ("E003", {"EVENTSTREAM_RETENTION": True}),
    ("E003", {"EVENTSTREAM_RETENTION": 0}),
    ("E003", {"EVENTSTREAM_RETENTION": timedelta(hours=-1)}),
    ("E003", {"EVENTSTREAM_RETENTION": float("inf")}),
    ("E023", {"EVENTSTREAM_CONSUMER_HOLD": None}),
    ("E023", {"EVENTSTREAM_CONSUMER_HOLD": "7d"}),
    ("E018", {"EVENTSTREAM_REPLAY_AGE": "1h"}),
    ("E018", {"EVENTSTREAM_REPLAY_AGE": True}),
    ("E018", {"EVENTSTREAM_REPLAY_AGE": 0}),
    ("E018", {"EVENTSTREAM_REPLAY_AGE": timedelta(hours=-1)}),
    ("E018", {"EVENTSTREAM_REPLAY_AGE": float("nan")}),
    ("E022", {"EVENTSTREAM_METRICS_TOKEN": ""}),
    ("E022", {"EVENTSTREAM_METRICS_TOKEN": "short"}),
    ("E022", {"EVENTSTREAM_METRICS_TOKEN": "with a space, which ends it"}),
    ("E022", {"EVENTSTREAM_METRICS_TOKEN": b"x" * 40}),
    ("E004", {"EVENTSTREAM_CHANNEL_LIMIT": 0}),
    ("E004", {"EVENTSTREAM_CHANNEL_LIMIT": 20}),
    ("E004", {"EVENTSTREAM_CHANNEL_LIMIT": "10"}),
    ("E004", {"EVENTSTREAM_CHANNEL_LIMIT": None}),
    ("E004", {"EVENTSTREAM_CHANNEL_LIMIT": True}),
    ("E005", {"EVENTSTREAM_NEXT_LINK_TIMEOUT": 4}),
    ("E005", {"EVENTSTREAM_NEXT_LINK_TIMEOUT": 0}),
    ("E005", {"EVENTSTREAM_NEXT_LINK_TIMEOUT": None}),
    ("E005", {"EVENTSTREAM_NEXT_LINK_TIMEOUT": "600"}),
    ("E017", {"EVENTSTREAM_MAX_AGE": 0}),
    ("E017", {"EVENTSTREAM_MAX_AGE": "60"}),
    ("E006", {"EVENTSTREAM_SAFETY_POLL": 0}),
    ("E006", {"EVENTSTREAM_SAFETY_POLL": -1}),
    ("E006", {"EVENTSTREAM_SAFETY_POLL": "5"}),
    ("E006", {"EVENTSTREAM_SAFETY_POLL": True}),
    ("E007", {"EVENTSTREAM_CHANNELMANAGER_CLASS": "no.such.module.Manager"}),
    ("E007", {"EVENTSTREAM_CHANNELMANAGER_CLASS": "pg_eventstream.channelmanager.Missing"}),
    ("E007", {"EVENTSTREAM_CHANNELMANAGER_CLASS": "NotDotted"}),
    ("E007", {"EVENTSTREAM_CHANNELMANAGER_CLASS": None}),
    ("E007", {"EVENTSTREAM_CHANNELMANAGER_CLASS": NO_MANAGER}),
    ("E007", {"EVENTSTREAM_CHANNELMANAGER_CLASS": "pg_eventstream.conf.conf"}),
    ("E008", {"GRIP_PROXIES": [{"key": SECRET.encode()}]}),
    ("E008", {"GRIP_PROXIES": [{**PROXY, "control_uri": "tcp://localhost:5560"}]}),
    ("E009", {"GRIP_PROXIES": [PROXY], "MIDDLEWARE": []}),
    ("E010", {"GRIP_URL": f"http://localhost:5562?key={SECRET}", "GRIP_PROXIES": [PROXY]}),
    ("E010", {"GRIP_URL": f"http://localhost:5562?key={SECRET}", "GRIP_PROXIES": []}),
    ("E011", {"GRIP_VERIFY_KEY": SECRET, "GRIP_URL": "http://localhost:5561"}),
    (
        "E011",
        {"GRIP_PROXIES": [{"control_uri": "http://localhost:5561", "verify_key": SECRET.encode()}]},
    ),
    ("E012", {"GRIP_VERIFY_KEY": f"base64:{BASE64_KEY}", "GRIP_URL": FASTLY}),
    ("E012", {"GRIP_VERIFY_KEY": JSON_WEB_KEY, "GRIP_URL": FASTLY}),
    ("E012", {"GRIP_VERIFY_KEY": PUBLIC_KEY[:-60], "GRIP_URL": FASTLY}),
    ("E012", {"GRIP_PROXIES": [{**PROXY, "key": "base64:c2VjcmV0"}]}),
    ("E013", {"GRIP_URL": FASTLY}),
    ("E013", {"GRIP_URL": FASTLY.partition("&")[0], "GRIP_VERIFY_KEY": PUBLIC_KEY}),
    *[
        ("E014", {name: value})
        for name in ("EVENTSTREAM_ALLOW_ORIGIN", "EVENTSTREAM_ALLOW_ORIGINS")
        for value in (
            *("example.com", "https://example.com/", "https://example.com/path", "null"),
            *("https://*.example.com", "https://a.example, https://b.example", "//example.com"),
            *("https://example.com:443", "http://example.com:80", "https://user@example.com"),
            *("https://bücher.example", " https://example.com", "https://example.com:x"),
            *(["https://fine.example", "http://example.com?x"], [None], 5, True, {"a": "b"}),
        )
    ],
    ("E015", {"EVENTSTREAM_ALLOW_CREDENTIALS": True, "EVENTSTREAM_ALLOW_ORIGIN": "*"}),
    ("E015", {"EVENTSTREAM_ALLOW_CREDENTIALS": True, "EVENTSTREAM_ALLOW_ORIGINS": ["*"]}),
    ("E016", {"EVENTSTREAM_ALLOW_HEADERS": "X-A: 1"}),
    ("E016", {"EVENTSTREAM_ALLOW_HEADERS": ["X-A\r\nX-B"]}),
    ("E016", {"EVENTSTREAM_ALLOW_HEADERS": 5}),
    ("W001", {"GRIP_URL": "http://localhost:5561"}),
    ("W001", {"GRIP_PROXIES": [{"control_uri": "http://localhost:5561"}]}),
    ("W001", {"GRIP_PROXIES": [{"control_uri": "http://localhost:5561", "key": ""}]}),
    ("W003", {"GRIP_URL": "http://localhost:5561?key=changeme"}),
    ("W003", {"GRIP_PROXIES": [{**PROXY, "verify_key": b"x" * 31}]}),
    ("W002", {"EVENTSTREAM_STORAGE_CLASS": "django_eventstream.storage.DjangoModelStorage"}),
    ("W002", {"EVENTSTREAM_STORAGE_CONNECTION": {"host": "localhost"}}),
    ("W005", {"EVENTSTREAM_RETENTION": 599, "GRIP_PROXIES": [PROXY]}),
    ("W004", TLS),
    ("W004", {**TLS, "SECURE_REDIRECT_EXEMPT": [r"^health/$"]}),
    ("W004", {**TLS, "SECURE_PROXY_SSL_HEADER": ("HTTP_X_FORWARDED_PROTO", "https")}),
    ("W002", {"EVENTSTREAM_REDIS": {"host": "localhost"}}),
]


@pytest.mark.parametrize(("number", "wrong"), WRONG)
def test_wrong_setting_is_reported_with_what_to_do(number: str, wrong: dict[str, Any]) -> None:
    (message,) = check(**wrong)
    assert message.id == f"pg_eventstream.{number}"
    assert type(message) is (Warning if number.startswith("W") else Error)
    assert message.hint
    # It names the setting to change.
    name = next(iter(wrong))
    assert name in f"{message.msg} {message.hint}" or name.startswith("GRIP")


NAN, INFINITY, HUGE = float("nan"), float("inf"), 10**400
NO_NUMBERS: list[Any] = ["", "60", "24h", "none", True, False, NAN, b"5", [], [60], {}, object()]
NOT_POSITIVE: list[Any] = [0, 0.0, -1, -0.5, -INFINITY]
TOO_LONG: list[Any] = [INFINITY, 1e300, HUGE]
#: For each setting that is a number: its property, the id of its check, and values it refuses.
NUMBERS: dict[str, tuple[str, str, list[Any]]] = {
    "EVENTSTREAM_RETENTION": (
        *("retention", "E003"),
        [timedelta(0), timedelta(hours=-1), timedelta.max, timedelta(days=365_001), 1e-7, 1e12],
    ),
    "EVENTSTREAM_CONSUMER_HOLD": (
        *("consumer_hold", "E023"),
        [None, timedelta(0), timedelta(days=-1), timedelta.max, timedelta(days=365_001), 1e-7],
    ),
    "EVENTSTREAM_REPLAY_AGE": (
        *("replay_age", "E018"),
        [timedelta(0), timedelta(hours=-1), timedelta.max, timedelta(days=365_001), 1e-7, 1e12],
    ),
    # A link is valid for a day.
    "EVENTSTREAM_NEXT_LINK_TIMEOUT": (
        *("next_link_timeout", "E005"),
        [None, 5.5, 600.0, timedelta(minutes=10), 86_401, 2**31],
    ),
    "EVENTSTREAM_CHANNEL_LIMIT": ("channel_limit", "E004", [None, 5.0, timedelta(1), INFINITY]),
    "EVENTSTREAM_SAFETY_POLL": ("safety_poll", "E006", [timedelta(seconds=5), 86_401, 2**31]),
    "EVENTSTREAM_MAX_AGE": ("max_age", "E017", [timedelta(seconds=5)]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_number_that_makes_no_sense_is_refused_by_check_and_when_it_is_used(name: str) -> None:
    attribute, number, own = NUMBERS[name]
    too_long = [] if name == "EVENTSTREAM_CHANNEL_LIMIT" else TOO_LONG
    for value in (*NO_NUMBERS, *NOT_POSITIVE, *too_long, *own):
        messages = check(**{name: value})
        assert [message.id for message in messages] == [f"pg_eventstream.{number}"], value
        assert name in messages[0].msg
        assert messages[0].hint
        with (
            override_settings(**{name: value}),
            pytest.raises(ImproperlyConfigured, match=f"^{name} must be ") as refused,
        ):
            getattr(conf, attribute)
        assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("EVENTSTREAM_RETENTION", None, None),
        ("EVENTSTREAM_RETENTION", 1e-6, timedelta(microseconds=1)),
        ("EVENTSTREAM_RETENTION", timedelta(days=365_000), timedelta(days=365_000)),
        ("EVENTSTREAM_CONSUMER_HOLD", 60, timedelta(minutes=1)),
        ("EVENTSTREAM_REPLAY_AGE", None, None),
        ("EVENTSTREAM_REPLAY_AGE", 60, timedelta(minutes=1)),
        ("EVENTSTREAM_REPLAY_AGE", timedelta(days=365_000), None),  # more than is kept
        ("EVENTSTREAM_NEXT_LINK_TIMEOUT", 86_400, 86_400),
        ("EVENTSTREAM_CHANNEL_LIMIT", 7, 7),
        ("EVENTSTREAM_SAFETY_POLL", None, None),
        ("EVENTSTREAM_SAFETY_POLL", 86_400, 86_400.0),
        ("EVENTSTREAM_MAX_AGE", None, None),
        ("EVENTSTREAM_MAX_AGE", 1e-3, 1e-3),
    ],
)
def test_number_at_the_limit_is_accepted(name: str, value: Any, read: Any) -> None:
    assert check(**{name: value}) == []
    with override_settings(**{name: value}):
        assert getattr(conf, NUMBERS[name][0]) == read


def test_every_number_among_the_settings_is_in_the_table() -> None:
    numbers = {
        name
        for name, attribute in vars(type(conf)).items()
        if isinstance(attribute, property)
        and re.match("int|float|timedelta", attribute.fget.__annotations__["return"])
    }
    assert numbers == {attribute for attribute, _, _ in NUMBERS.values()}


def test_database_that_is_not_postgresql_is_reported() -> None:
    [message] = in_a_project(
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
    )
    assert message.startswith("pg_eventstream.E002")


def test_project_without_pgtrigger_is_told_what_to_install() -> None:
    with pytest.raises(AssertionError, match=r'Add "pgtrigger" to INSTALLED_APPS'):
        in_a_project(INSTALLED_APPS=["django.contrib.postgres", "pg_eventstream"])


def test_apps_may_be_named_by_their_configs_and_in_any_order() -> None:
    for installed in (
        ["pg_eventstream", "pgtrigger.apps.PGTriggerConfig"],
        ["pg_eventstream.apps.PgEventStreamConfig", "pgtrigger"],
    ):
        assert in_a_project(INSTALLED_APPS=installed) == []


def in_a_project(**overrides: Any) -> list[str]:
    """Run ``check`` in a new project. Returns "id: message hint" for each message."""
    values = {
        "SECRET_KEY": "x",
        "INSTALLED_APPS": ["pgtrigger", "pg_eventstream"],
        "DATABASES": {"default": settings.DATABASES["default"]},
        **overrides,
    }
    names = ("ENGINE", "NAME", "USER", "HOST", "PORT")
    values["DATABASES"] = {
        alias: {name: database[name] for name in names if name in database}
        for alias, database in values["DATABASES"].items()
    }
    program = f"""
import django
from django.conf import settings
settings.configure(**{values!r})
django.setup()
from django.core.checks import run_checks
for message in run_checks():
    print(message.id, message.msg, message.hint, sep=": ")
"""
    done = forked.run(
        [sys.executable, "-c", program],
        directory=ROOT,
        environment={k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


DAPHNE, STATIC = "daphne", "django.contrib.staticfiles"


@pytest.mark.parametrize(
    ("installed", "more", "ids"),
    [
        ([STATIC], {}, {"W006"}),
        ([STATIC, DAPHNE], {"ASGI_APPLICATION": "myproject.asgi.application"}, {"W006"}),
        ([DAPHNE, STATIC], {}, {"W008"}),
        ([DAPHNE, STATIC], {"ASGI_APPLICATION": "myproject.asgi.application"}, set()),
    ],
)
def test_runserver_that_streams_nothing_is_reported(
    installed: list[str], more: dict[str, Any], ids: set[str]
) -> None:
    messages = in_a_project(
        DEBUG=True,
        INSTALLED_APPS=[*installed, "pgtrigger", "pg_eventstream"],
        STATIC_URL="/static/",
        **more,
    )
    found = {message.partition(":")[0] for message in messages}
    assert found - {"daphne.E001"} == {f"pg_eventstream.{number}" for number in ids}


def test_runserver_may_be_wsgi_in_production_and_behind_a_proxy() -> None:
    (message,) = check(DEBUG=True)
    assert message.id == "pg_eventstream.W006"
    assert message.hint
    assert "pip install daphne" in message.hint
    assert check(DEBUG=True, GRIP_PROXIES=[PROXY]) == check(DEBUG=False) == []


def test_every_id_is_tested_and_stands_for_one_setting() -> None:
    source = inspect.getsource(checks) + inspect.getsource(proxies)
    ids = set(re.findall(r"pg_eventstream\.([EW]\d{3})", source))
    settings_of: dict[str, set[str]] = {}
    for number, wrong in WRONG:
        name = next(iter(wrong))
        # One name stands for the proxies, the origins and the storage.
        group = re.match("GRIP_|EVENTSTREAM_ALLOW_ORIGIN", name)
        name = "storage" if number == "W002" else group[0] if group else name
        settings_of.setdefault(number, set()).add(name)
    # The databases and routers are tested in tests/integration/test_second_database.py
    assert ids == {*settings_of, "E002", "E019", "W006", "W007", "W008"}
    assert {number: names for number, names in settings_of.items() if len(names) > 1} == {}


def test_public_key_without_cryptography_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxies, "has_crypto", False)
    (message,) = check(GRIP_URL=FASTLY, GRIP_VERIFY_KEY=PUBLIC_KEY)
    assert message.id == "pg_eventstream.E012"
    assert "pip install" in message.msg


def test_settings_are_checked_by_every_command_that_checks() -> None:
    registered: Any = registry.registry
    assert checks.check_settings in registered.registered_checks
    assert checks.check_settings not in registered.deployment_checks


def test_wrong_settings_are_all_reported_at_once() -> None:
    found = check(
        EVENTSTREAM_RETENTION=0, EVENTSTREAM_CHANNEL_LIMIT=0, GRIP_URL="tcp://localhost:5560"
    )
    assert [message.id for message in found] == [
        "pg_eventstream.E003",
        "pg_eventstream.E004",
        "pg_eventstream.E008",
    ]
