"""All forms in which a project can mount the endpoint."""

from django.urls import include, path, re_path

import pg_eventstream

urlpatterns = [
    path("events/", include("pg_eventstream.urls")),
    path("module/", include(pg_eventstream.urls)),
    path("no-slash", include(pg_eventstream.urls)),
    path("fixed/", include(pg_eventstream.urls), {"channels": ["one", "two"]}),
    path("channel/<channel>/", include(pg_eventstream.urls)),
    path("rooms/<room>/", include(pg_eventstream.urls), {"format-channels": ["{room}", "all"]}),
    re_path(
        r"^objects/(?P<kind>\w+)/(?P<number>[0-9]+)/",
        include(pg_eventstream.urls),
        {"format-channels": ["{kind}-{number}"]},
    ),
    path("deep/<path:room>/events/", include(pg_eventstream.urls), {"channels": ["deep"]}),
    path("open/<path:room>/", include(pg_eventstream.urls), {"channels": ["open"]}),
    re_path(r"^(?P<anything>/.*)/", include(pg_eventstream.urls), {"channels": ["loose"]}),
]
