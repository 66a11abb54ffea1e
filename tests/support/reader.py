"""What a reader of the documentation has, and how it uses the examples."""

from __future__ import annotations

from tests.support.documentation import Example
from tests.support.projects import Project

#: The files that `startproject` and the reader have written.
BEFORE = """
import os
SECRET_KEY = os.environ["SECRET_KEY"]
DEBUG = True
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "myproject.urls"
STATIC_URL = "/static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {
    "ENGINE": "django.db.backends.postgresql",
    "NAME": os.environ["PGDATABASE"],
    "USER": os.environ["PGUSER"],
    "HOST": os.environ["PGHOST"],
    "PORT": os.environ["PGPORT"],
}}
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "shop",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
TEMPLATES = [{
    "BACKEND": "django.template.backends.django.DjangoTemplates",
    "DIRS": [os.environ["PROJECT"]],
    "APP_DIRS": True,
}]
"""
ASGI = """
from django.core.asgi import get_asgi_application
application = get_asgi_application()
"""
MODELS = """
from django.db import models, transaction
from pg_eventstream import send_event

class Order(models.Model):
    paid = models.BooleanField(default=False)

    def pay(self):
        with transaction.atomic():
            self.paid = True
            self.save()
            send_event("orders", "paid", {"order": self.pk})
"""
MORE_URLS = """
from django.views.generic import TemplateView
from django.http import HttpResponse
urlpatterns += [
    path("", TemplateView.as_view(template_name="page.html")),
    path("favicon.ico", lambda request: HttpResponse(status=204)),
]
"""


def put_behind_pushpin(project: Project) -> None:
    project.write(
        "myproject/settings.py",
        '\nGRIP_URL = os.environ["GRIP_URL"]\n'
        'MIDDLEWARE = ["django_grip.GripMiddleware", *MIDDLEWARE]\n',
    )


def add(project: Project, one: Example) -> None:
    """Write the example to the file that it names."""
    assert one.path, one.code
    project.write(one.path, f"\n{one.code}")


def migrate(project: Project) -> None:
    """Check without a warning, and migrate. In one process, since most of the time is its start."""
    code = """
from django.core.management import call_command
call_command("check", fail_level="WARNING", verbosity=0)
call_command("migrate", run_syncdb=True, verbosity=0)
"""
    project.manage("shell", "--no-imports", "-c", code)


def run_python(project: Project, one: Example, before: str = "", after: str = "") -> str:
    """Run the example as if it were typed into the project's shell."""
    return project.manage("shell", "--no-imports", "-c", f"{before}\n{one.code}\n{after}")
