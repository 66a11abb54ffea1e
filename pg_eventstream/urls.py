from django.urls import path

from . import endpoint, views
from .grip import links

endpoint.require_installed()

urlpatterns = [
    path("", views.events, name=views.EVENTS_URL),
    # The proxy's own requests. Clients never see these URLs.
    path(f"{links.NEXT}<token>", views.next_link, name=views.NEXT_LINK_URL),
]
