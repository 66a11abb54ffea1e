"""Views in all forms, among others, in a project that describes its API by OpenAPI."""

from __future__ import annotations

from typing import Any

from django.urls import include, path
from drf_spectacular.openapi import AutoSchema
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import CharField, Serializer
from rest_framework.views import APIView

from pg_eventstream.viewsets import EventsView
from tests.project import drf_urls


@extend_schema(responses={(200, "text/event-stream"): OpenApiTypes.STR})
class Described(EventsView):
    schema = AutoSchema()


class OrderSerializer(Serializer[None]):
    name = CharField()


class Orders(APIView):
    serializer_class = OrderSerializer

    def get(self, request: Request) -> Response:
        return Response({"name": "x"})


patterns: list[Any] = drf_urls.urlpatterns
ours = [pattern for pattern in patterns if "no-stream" not in str(pattern.pattern)]
urlpatterns = [
    *ours,
    path("orders/", Orders.as_view()),
    path("described/", Described.as_view()),
    path("again/", include("pg_eventstream.urls")),
]
