from django.contrib import admin
from django.urls import path

from tests.project.urls import urlpatterns as others

urlpatterns = [path("admin/", admin.site.urls), *others]
