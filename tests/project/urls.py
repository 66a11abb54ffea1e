from django.urls import include, path

from pg_eventstream import views

urlpatterns = [
    path("events/", include("pg_eventstream.urls")),
    path("metrics", views.metrics),
    path("rooms/<room>/events/", include("pg_eventstream.urls"), {"format-channels": ["{room}"]}),
]
