"""Views of Django REST Framework with channels from the URLconf."""

from __future__ import annotations

from django.urls import include, path
from rest_framework.routers import SimpleRouter

from pg_eventstream.viewsets import EventsView, EventsViewSet

router = SimpleRouter()
router.register("set", EventsViewSet, basename="set")

urlpatterns = [
    path("mounted/view/", EventsView.as_view(), {"channels": ["news"]}),
    path("mounted/<channel>/view/", EventsView.as_view()),
    path("mounted/", include(router.urls), {"channels": ["news"]}),
    path("events/", include("pg_eventstream.urls")),
]
