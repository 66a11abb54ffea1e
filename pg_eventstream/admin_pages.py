"""Shared by the pages in Django's admin, on which no object can be added, changed or deleted."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import psycopg
from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse

from .postgres.connector import explain

_View = Callable[..., HttpResponse]


def requires(*permissions: str) -> Callable[[_View], _View]:
    """Refuse users who lack one of the permissions, and show errors of the database."""

    def decorate(view: _View) -> _View:
        @wraps(view)
        def checked(
            self: PagesAdmin, request: HttpRequest, *args: Any, **more: Any
        ) -> HttpResponse:
            if not request.user.is_active or not request.user.has_perms(permissions):
                raise PermissionDenied
            try:
                return view(self, request, *args, **more)
            except (DatabaseError, psycopg.Error) as e:
                error = explain(e) if isinstance(e, psycopg.Error) else str(e)
                title = str(self.opts.verbose_name_plural).capitalize()
                return self.render(request, "error", title, status=503, error=error)

        return checked

    return decorate


class PagesAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Pages of its own instead of forms for the objects of the model."""

    view_permission: str

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return request.user.is_active and request.user.has_perm(self.view_permission)

    def redirect(self, view: str, *args: Any) -> HttpResponse:
        site = self.admin_site.name
        return HttpResponseRedirect(reverse(f"admin:{view}", args=args, current_app=site))

    def render(
        self,
        request: HttpRequest,
        template: str,
        title: str,
        *,
        status: int = 200,
        **context: Any,
    ) -> HttpResponse:
        request.current_app = self.admin_site.name
        return TemplateResponse(
            request,
            f"pg_eventstream/admin/{template}.html",
            {
                **self.admin_site.each_context(request),
                "opts": self.opts,
                "title": title,
                **context,
            },
            status=status,
        )
