from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views.static import serve

from tests import pages, urls
from tests.classic_script import STATIC


def page(request: HttpRequest, kind: str) -> HttpResponse:
    return HttpResponse(pages.html(kind))


urlpatterns = [
    *urls.urlpatterns,
    path("pages/<kind>/", page),
    path("static/<path:path>", serve, {"document_root": STATIC}),
]
