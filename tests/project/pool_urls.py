"""The endpoint, and an ordinary view that queries the database."""

from django.http import HttpRequest, HttpResponse
from django.urls import include, path

from tests.project.app.models import Membership


def ordinary(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(Membership.objects.count()))


urlpatterns = [path("events/", include("pg_eventstream.urls")), path("ordinary/", ordinary)]
