"""Settings that add Django REST Framework to the test project."""

from __future__ import annotations

from django.conf import settings

APPS = [*settings.INSTALLED_APPS, "django.contrib.staticfiles", "rest_framework"]
DRF = {
    "ROOT_URLCONF": "tests.project.drf_urls",
    "INSTALLED_APPS": APPS,
    "MIDDLEWARE": [*settings.MIDDLEWARE, "tests.project.drf_urls.own_scripts_only"],
    "STATIC_URL": "/static/",
    "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channelmanagers.Members",
    "EVENTSTREAM_NEXT_LINK_TIMEOUT": 5,
}
