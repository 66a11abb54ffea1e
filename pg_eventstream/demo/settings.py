"""The demo's Django project. `python -m pg_eventstream.demo` sets the environment variables."""

from __future__ import annotations

import os

from psycopg.conninfo import conninfo_to_dict

SECRET_KEY = os.environ["DEMO_SECRET_KEY"]
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
USE_TZ = True
TIME_ZONE = "UTC"

DSN = os.environ["DEMO_DSN"]
PSQL = os.environ["DEMO_PSQL"]
URL = os.environ["DEMO_URL"]

_dsn = conninfo_to_dict(DSN)
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _dsn["dbname"],
        "USER": _dsn["user"],
        "HOST": _dsn["host"],
        "PORT": _dsn["port"],
    }
}

INSTALLED_APPS = ["pgtrigger", "pg_eventstream", "pg_eventstream.demo"]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
]
PROXIED = "DEMO_GRIP_URL" in os.environ
if PROXIED:
    MIDDLEWARE.insert(0, "django_grip.GripMiddleware")
    # The control port of the proxy, and the key with which it signs its requests.
    GRIP_URL = os.environ["DEMO_GRIP_URL"]

ROOT_URLCONF = "pg_eventstream.demo.urls"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
