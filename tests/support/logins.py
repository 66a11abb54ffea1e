"""The fixture ``login`` of tests/endpoint."""

from __future__ import annotations

from collections.abc import Callable

from django.test import Client

#: Makes a client of a new user: ``login("view_event", staff=True, checks_csrf=False)``.
Login = Callable[..., Client]
