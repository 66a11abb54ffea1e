from django.urls import path

from . import views

urlpatterns = [
    path("", views.events),
    # The proxy's own requests; clients never see these addresses.
    path("next/<token>", views.next_link),
]
