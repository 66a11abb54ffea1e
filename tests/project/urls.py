from django.urls import include, path

urlpatterns = [
    path("events/", include("pg_eventstream.urls")),
    path("rooms/<room>/events/", include("pg_eventstream.urls"), {"format-channels": ["{room}"]}),
]
