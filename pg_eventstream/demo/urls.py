from pathlib import Path

from django.urls import include, path
from django.views.generic import TemplateView
from django.views.static import serve

import pg_eventstream
from pg_eventstream.demo import views

urlpatterns = [
    path("", views.page),
    path(
        "demo.css",
        TemplateView.as_view(
            template_name="pg_eventstream_demo/demo.css", content_type="text/css; charset=utf-8"
        ),
    ),
    path(
        "demo.js",
        TemplateView.as_view(
            template_name="pg_eventstream_demo/demo.js",
            content_type="text/javascript; charset=utf-8",
        ),
    ),
    path(
        "static/<path:path>", serve, {"document_root": Path(pg_eventstream.__path__[0], "static")}
    ),
    path("send/", views.send),
    path("seen/<int:event_id>/", views.seen),
    path("events/", include("pg_eventstream.urls")),
]
