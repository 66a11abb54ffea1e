from django.contrib import admin
from django.urls import path

from pg_eventstream.admin import EventAdmin
from pg_eventstream.models import Event
from tests.project.urls import urlpatterns as others

operators = admin.AdminSite(name="operators")
operators.site_header = "Operators"
operators.register(Event, EventAdmin)
urlpatterns = [path("operators/", operators.urls), *others]
