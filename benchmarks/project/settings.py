"""BENCHMARK_PACKAGE names the package, and the PG* variables the database.

BENCHMARK_SETTINGS contains further settings in JSON.
"""

import json
import os

PACKAGE = os.environ.get("BENCHMARK_PACKAGE", "pg_eventstream")

SECRET_KEY = "a key for benchmarks only, long enough for HS256"
ALLOWED_HOSTS = ["*"]
USE_TZ = True
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ.get("PGDATABASE", ""),
        "USER": os.environ.get("PGUSER", ""),
        "HOST": os.environ.get("PGHOST", ""),
        "PORT": os.environ.get("PGPORT", ""),
        # Statements are prepared, as psycopg does without Django.
        "OPTIONS": {"prepare_threshold": int(os.environ.get("BENCHMARK_PREPARE", "5")) or None},
    }
}
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "pgtrigger",
    PACKAGE,
    "benchmarks.project",
]
if PACKAGE == "django_eventstream":
    EVENTSTREAM_STORAGE_CLASS = "django_eventstream.storage.DjangoModelStorage"
MIDDLEWARE = ["django_grip.GripMiddleware"]
if PACKAGE != "pgpubsub":  # which has no streams
    ROOT_URLCONF = "benchmarks.project.urls"
ASGI_APPLICATION = "benchmarks.project.asgi.application"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

globals().update(json.loads(os.environ.get("BENCHMARK_SETTINGS", "{}")))
