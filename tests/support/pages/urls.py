from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views.static import serve

from tests.project import urls
from tests.support import pages
from tests.support.classic_script import STATIC


def page(request: HttpRequest, kind: str) -> HttpResponse:
    return HttpResponse(pages.html(kind))


urlpatterns = [
    *urls.urlpatterns,
    path("pages/<kind>/", page),
    path("static/<path:path>", serve, {"document_root": STATIC}),
]
