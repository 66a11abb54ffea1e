"""The endpoint below a language prefix, and a project's own view without one."""

from __future__ import annotations

from django.conf.urls.i18n import i18n_patterns
from django.contrib.auth.decorators import login_required
from django.urls import include, path

from pg_eventstream import views

urlpatterns = [
    path("own/", login_required(views.events)),
    *i18n_patterns(path("i18n/", include("pg_eventstream.urls"))),
]
