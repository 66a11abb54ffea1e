"""Views of Django REST Framework, in the forms in which a project can mount them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.contrib.auth.models import User
from django.contrib.staticfiles.views import serve
from django.http import HttpRequest, HttpResponse
from django.urls import include, path, re_path
from rest_framework.authentication import TokenAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.permissions import BasePermission, IsAuthenticated
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.routers import DefaultRouter, SimpleRouter
from rest_framework.throttling import SimpleRateThrottle
from rest_framework.versioning import URLPathVersioning
from rest_framework.views import APIView

from pg_eventstream.renderers import BrowsableAPIEventStreamRenderer, SSEEventRenderer
from pg_eventstream.viewsets import EventsView, EventsViewSet, configure_events_view_set


class NameAsToken(TokenAuthentication):
    """``Authorization: Token NAME``, without a table of tokens."""

    def authenticate_credentials(self, key: str) -> tuple[Any, Any]:
        user = User.objects.filter(username=key).first()
        if user is None:
            raise AuthenticationFailed("There is no such user.")
        return user, key


class Nobody(BasePermission):
    def has_permission(self, request: Request, view: APIView) -> bool:
        return False


class OncePerChannel(SimpleRateThrottle):
    rate = "1/day"

    def get_cache_key(self, request: Request, view: APIView) -> str:
        return str(request.query_params["channels"])


class ForMembers(EventsViewSet):
    authentication_classes = (NameAsToken,)

    def get_permissions(self) -> list[Any]:
        return [IsAuthenticated()]


class ForNobody(EventsViewSet):
    permission_classes = (Nobody,)


class Throttled(EventsViewSet):
    throttle_classes = (OncePerChannel,)


class Versioned(EventsViewSet):
    versioning_class = URLPathVersioning


class Configured(EventsViewSet):
    channels = ("public-one", "public-two")
    messages_types = ("message", "info")


class AlsoJSON(Configured):
    renderer_classes = (JSONRenderer, SSEEventRenderer)


class ShortFormat(SSEEventRenderer):
    format = "sse"


class WithSuffix(Configured):
    renderer_classes = (ShortFormat, JSONRenderer)


class NoStream(APIView):
    """A project's own view with all renderers, which settings can give to it."""

    renderer_classes = (JSONRenderer, SSEEventRenderer, BrowsableAPIEventStreamRenderer)

    def get(self, request: Request) -> Response:
        return Response({"channels": ["seven"], "messages_types": 7})


def own_scripts_only(
    get_response: Callable[[HttpRequest], HttpResponse],
) -> Callable[[HttpRequest], HttpResponse]:
    """A middleware that forbids inline scripts and scripts from other origins."""

    def middleware(request: HttpRequest) -> HttpResponse:
        response = get_response(request)
        # (Playwright uses eval() to wait for conditions.)
        policy = "script-src 'self' 'unsafe-eval'; connect-src 'self'"
        response["Content-Security-Policy"] = policy
        return response

    return middleware


router = DefaultRouter()
router.register("events", EventsViewSet, basename="events")
router.register("members", ForMembers, basename="members")
router.register("nobody", ForNobody, basename="nobody")
router.register("throttled", Throttled, basename="throttled")
router.register("class", Configured, basename="class")
router.register("json", AlsoJSON, basename="json")
router.register(
    "function",
    configure_events_view_set(
        channels=["public-one", "public-two"], messages_types=["message", "info"]
    ),
    basename="function",
)
without_slash = DefaultRouter(trailing_slash=False)
without_slash.include_root_view = False
without_slash.register("suffix", WithSuffix, basename="suffix")
without_slash.register("bare", EventsViewSet, basename="bare")
versioned = SimpleRouter()
versioned.register("events", Versioned, basename="versioned")
at_the_mount = SimpleRouter()
at_the_mount.register("", EventsViewSet, basename="at-the-mount")

urlpatterns = [
    path("", include(router.urls)),
    path("", include(without_slash.urls)),
    path("nested/", include((router.urls, "api"), namespace="first")),
    path("<version>/versioned/", include(versioned.urls)),
    path("rooms/<room>/", include(at_the_mount.urls), {"format-channels": ["public-{room}"]}),
    path("view/", EventsView.as_view(channels=["public-one"])),
    path("view/any/", EventsView.as_view()),
    path(
        "direct/",
        EventsViewSet.as_view({"get": "list"}, channels=["public-one"]),
    ),
    path("no-list/", EventsView.as_view(channels="public-one")),
    path("no-stream/", NoStream.as_view()),
    path("plain/", include("pg_eventstream.urls")),
    path("favicon.ico", lambda request: HttpResponse(status=204)),
    re_path(r"^static/(?P<path>.*)$", serve, {"insecure": True}),
]
