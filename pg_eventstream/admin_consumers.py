"""Django's admin: consumers, their parked events, and what a person does with them.

The operations are those of the command, with permissions of their own. The log of them is where the
admin keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, DELETION, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.urls import path
from django.urls.resolvers import URLPattern

from .admin_pages import PagesAdmin, requires
from .conf import conf
from .consumers import operations
from .consumers.declare import discover
from .consumers.exclusive import patient_transaction
from .consumers.progress import ConsumerState, read_consumers
from .consumers.targets import FORMS, parse_target
from .consumers.trouble import list_parked
from .errors import EventStreamError, OperationRefused
from .limits import LIMITS
from .models import Consumer
from .operate.consumer_screen import describe, details
from .postgres.connector import Connector

_VIEW = "pg_eventstream.view_consumer"
_VIEW_PARKED = "pg_eventstream.view_parked"
_OPERATE = "pg_eventstream.operate_consumer"
_RETRY = "pg_eventstream.retry_parked"
_URL = "pg_eventstream_consumer_"
#: A page of a consumer shows so many parked events.
MOST_PARKED = 100


@dataclass(frozen=True, slots=True)
class _Listed:
    pk: int | None
    name: str
    kind: str
    words: str
    details: list[str]


@dataclass(frozen=True, slots=True)
class _Operation:
    permission: str
    #: Does it, with the alias, the name and the fields of the form. Returns what it has done.
    do: Callable[[str, str, Any], str]


def _pause(alias: str, name: str, fields: Any) -> str:
    return "Paused." if operations.pause(alias, name) else "It was paused already."


def _resume(alias: str, name: str, fields: Any) -> str:
    resumed = operations.resume(alias, name)
    done = ["Resumed."] if resumed.was_paused else []
    if resumed.stopped:
        done.append(f"Slots that had stopped and try again: {resumed.stopped}.")
    return " ".join(done) or "It was neither paused nor stopped."


def _reset(alias: str, name: str, fields: Any) -> str:
    done = operations.reset(alias, name, parse_target(fields.get("to", "")))
    text = f"Reset: it continues after position {done.position:,}."
    if done.replay_to is not None:
        text += f" Events up to position {done.replay_to:,} are handled again."
        if not done.prepared:
            text += " Its code has no function for before_reset."
    return text


def _chosen(fields: Any) -> list[str]:
    chosen: list[str] = fields.getlist("id")
    if not chosen:
        raise OperationRefused("Nothing was changed, because no event was selected.")
    return chosen


def _retry(alias: str, name: str, fields: Any) -> str:
    chosen = None if "all" in fields else _chosen(fields)
    return f"Parked events that will be tried again: {operations.retry(alias, name, chosen)}."


def _skip(alias: str, name: str, fields: Any) -> str:
    return f"Skipped {operations.skip(alias, name, fields.get('id', '')).id}."


def _skip_selected(alias: str, name: str, fields: Any) -> str:
    return f"Skipped parked events: {operations.skip_parked(alias, name, _chosen(fields))}."


def _remove(alias: str, name: str, fields: Any) -> str:
    if fields.get("confirm") != name:
        raise OperationRefused(
            f"Nothing was removed. To confirm, type the name of the consumer: {name}"
        )
    operations.remove(alias, name)
    return f"Removed all that was stored about {name}."


_OPERATIONS = {
    "pause": _Operation(_OPERATE, _pause),
    "resume": _Operation(_OPERATE, _resume),
    "reset": _Operation(_OPERATE, _reset),
    "remove": _Operation(_OPERATE, _remove),
    "retry": _Operation(_RETRY, _retry),
    "skip": _Operation(_RETRY, _skip),
    "skip-selected": _Operation(_RETRY, _skip_selected),
}


@admin.register(Consumer)
class ConsumerAdmin(PagesAdmin):
    """Shows and operates consumers. Register it with an admin site of your own, if you have one."""

    view_permission = _VIEW

    def get_urls(self) -> list[URLPattern]:
        wrap = self.admin_site.admin_view
        return [
            path("", wrap(self.list_view), name=f"{_URL}changelist"),
            path("<int:pk>/change/", wrap(self.consumer_view), name=f"{_URL}change"),
            path("<int:pk>/operate/", wrap(self.operate_view), name=f"{_URL}operate"),
        ]

    @requires(_VIEW)
    def list_view(self, request: HttpRequest) -> HttpResponse:
        states, error = _read()
        pks = _pks()
        listed = [_Listed(pks.get(state.name), *_row(state)) for state in states]
        return self._render(request, "consumers", "Consumers", consumers=listed, import_error=error)

    @requires(_VIEW)
    def consumer_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        name = _name_of(pk)
        states, error = _read()
        state = next((one for one in states if one.name == name), None)
        if state is None:
            raise Http404("The consumer was removed just now.")
        parked = []
        pages = Paginator(range(state.parked), MOST_PARKED)
        page = pages.get_page(request.GET.get("p"))
        if request.user.has_perm(_VIEW_PARKED) and state.parked:
            with _connect() as connection:
                parked = list_parked(
                    connection,
                    pk,
                    content="shortened",
                    most=MOST_PARKED,
                    skipped=(page.number - 1) * MOST_PARKED,
                )
        return self._render(
            request,
            "consumer",
            f"Consumer {name}",
            consumer=_Listed(pk, *_row(state)),
            state=state,
            troubled=[*state.stopped, *state.failing],
            parked=parked,
            page=page,
            pages=pages.get_elided_page_range(page.number),
            forms=FORMS,
            import_error=error,
        )

    @requires()
    def operate_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        operation = request.POST.get("operation", "")
        chosen = _OPERATIONS.get(operation)
        if chosen is None or not request.user.has_perm(chosen.permission):
            raise PermissionDenied
        name = _name_of(pk)
        alias = conf.database
        try:
            with patient_transaction(alias, LIMITS):
                done = chosen.do(alias, name, request.POST)
                LogEntry.objects.create(
                    user_id=request.user.pk,
                    content_type=ContentType.objects.get_for_model(Consumer),
                    object_id=str(pk),
                    object_repr=name[:200],
                    action_flag=DELETION if operation == "remove" else CHANGE,
                    change_message=done,
                )
        except EventStreamError as e:
            self.message_user(request, str(e), messages.ERROR)
        else:
            self.message_user(request, f"Consumer {name}: {done}", messages.SUCCESS)
            if operation == "remove":
                return self.redirect(f"{_URL}changelist")
        return self.redirect(f"{_URL}change", pk)

    def _render(
        self, request: HttpRequest, template: str, title: str, **context: Any
    ) -> HttpResponse:
        may = {
            "may_operate": request.user.has_perm(_OPERATE),
            "may_retry": request.user.has_perm(_RETRY),
            "may_view_parked": request.user.has_perm(_VIEW_PARKED),
        }
        return self.render(request, template, title, **may, **context)


def _connect() -> Any:
    return Connector(conf.database).connect("admin", patience=LIMITS.command_patience)


def _read() -> tuple[list[ConsumerState], str | None]:
    """The states of all consumers; why the code that declares them cannot be imported."""
    declared, error = None, None
    try:
        declared = discover()
    except Exception as e:  # noqa: BLE001
        error = f"{type(e).__name__}: {e}"
    with _connect() as connection:
        return read_consumers(connection, declared) or [], error


def _row(state: ConsumerState) -> tuple[str, str, str, list[str]]:
    kind, words = describe(state)
    return state.name, kind, words, [*details(state)]


def _pks() -> dict[str, int]:
    return dict(Consumer.objects.using(conf.database).values_list("name", "pk"))


def _name_of(pk: int) -> str:
    found = Consumer.objects.using(conf.database).filter(pk=pk).values_list("name", flat=True)
    for name in found:
        return name
    raise Http404(f"There is no consumer {pk}: it was removed.")
