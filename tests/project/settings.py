"""Settings of the test project. The servers' addresses come from the environment."""

import json
import os
from pathlib import Path

from gripcontrol import parse_grip_uri
from psycopg.conninfo import conninfo_to_dict

_dsn = conninfo_to_dict(os.environ.get("PG_EVENTSTREAM_TEST_DSN", "dbname=pg_eventstream"))

SECRET_KEY = "a key for tests only, long enough for HS256 and for nothing else"
DEBUG = False
ALLOWED_HOSTS = ["*"]
USE_TZ = True
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _dsn.get("dbname"),
        "USER": _dsn.get("user", ""),
        "HOST": _dsn.get("host", ""),
        "PORT": str(_dsn.get("port", "")),
    }
}
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django.contrib.sessions",
    "pgtrigger",
    "pg_eventstream",
    "tests.project.app",
]
MIDDLEWARE = [
    "django_grip.GripMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
ROOT_URLCONF = "tests.project.urls"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [Path(__file__).parent / "templates"],
        "APP_DIRS": True,
    }
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

# One proxy, or several separated by spaces.
_grip_urls = os.environ.get("PG_EVENTSTREAM_TEST_GRIP_URL", "").split()
if len(_grip_urls) == 1:
    GRIP_URL = _grip_urls[0]
elif _grip_urls:
    GRIP_PROXIES = [parse_grip_uri(url) for url in _grip_urls]
if os.environ.get("PG_EVENTSTREAM_TEST_SAFETY_POLL"):
    EVENTSTREAM_SAFETY_POLL = (
        None
        if os.environ["PG_EVENTSTREAM_TEST_SAFETY_POLL"] == "off"
        else float(os.environ["PG_EVENTSTREAM_TEST_SAFETY_POLL"])
    )

# Any setting by its name, for the servers of one test.
globals().update(json.loads(os.environ.get("PG_EVENTSTREAM_TEST_SETTINGS", "{}")))
