"""The test project with Django's admin, and clients of its users."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connection
from django.test import Client, override_settings

from tests.support.database import Database
from tests.support.logins import Login


@pytest.fixture
def admin(database: Database) -> Iterator[None]:
    """The test project with the admin."""
    names = ("INSTALLED_APPS", "MIDDLEWARE", "TEMPLATES", "ROOT_URLCONF", "STATIC_URL")
    from tests.project import admin_settings

    with override_settings(**{name: getattr(admin_settings, name) for name in names}):
        from django.contrib.admin.models import LogEntry

        with connection.schema_editor() as editor:
            editor.create_model(LogEntry)
        yield


@pytest.fixture
def login(admin: None) -> Login:
    """Makes clients of new users with these permissions."""

    def log_in(*permissions: str, staff: bool = True, checks_csrf: bool = False) -> Client:
        from django.contrib.auth.models import Permission, User

        name = f"user {User.objects.count()}"
        user = User.objects.create_user(name, is_staff=staff)
        for permission in permissions:
            user.user_permissions.add(Permission.objects.get(codename=permission))
        client = Client(enforce_csrf_checks=checks_csrf)
        client.force_login(user)
        return client

    return log_in
