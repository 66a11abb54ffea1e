"""A project that has not mounted the endpoint."""

from __future__ import annotations

from typing import Any

urlpatterns: list[Any] = []
