"""Django's admin: events, channels and the state, and two actions with permissions of their own.

The pages of consumers are in `admin_consumers`.

Nobody can add, change or delete an event here. The events are in ``EVENTSTREAM_DATABASE``, and the
log of the actions is where the admin keeps it.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import psycopg
from django import forms
from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.db import DatabaseError, connections, transaction
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import path, reverse
from django.urls.resolvers import URLPattern
from django.utils.html import format_html

from .admin_consumers import ConsumerAdmin
from .admin_pages import PagesAdmin, requires
from .channels import problem_of_name
from .checks.tables import SEND_AGAIN
from .conf import conf
from .errors import InvalidEvent
from .models import Event
from .operate.events import browse
from .operate.findings import judge
from .operate.screen import render
from .operate.state import read_state
from .postgres.connector import explain
from .send import NewEvent, Row, parse_json, to_row

__all__ = ["ConsumerAdmin", "EventAdmin"]

_VIEW = "pg_eventstream.view_event"
_SEND = "pg_eventstream.send_event"
_RETRY = "pg_eventstream.retry_event"
_URL = "pg_eventstream_event_"


class _Moment(forms.DateTimeInput):
    input_type = "datetime-local"

    def __init__(self) -> None:
        super().__init__(format="%Y-%m-%dT%H:%M:%S", attrs={"step": 1})


class _FilterForm(forms.Form):
    channel = forms.CharField(required=False, strip=False, help_text="The exact name.")
    type = forms.CharField(
        required=False,
        strip=False,
        help_text=f"Searches the newest {browse.SEARCHED:,} events that match otherwise.",
    )
    since = forms.DateTimeField(required=False, widget=_Moment)
    until = forms.DateTimeField(required=False, widget=_Moment)
    before = forms.IntegerField(
        required=False, min_value=-(2**63), max_value=2**63 - 1, widget=forms.HiddenInput
    )

    def clean_channel(self) -> str:
        return _check_text(self.cleaned_data["channel"])

    def clean_type(self) -> str:
        return _check_text(self.cleaned_data["type"])


def _check_text(text: str) -> str:
    if text and (problem := problem_of_name(text)):
        raise forms.ValidationError(f"The name {problem}.")
    return text


class _SendForm(forms.Form):
    channel = forms.CharField(max_length=255)
    type = forms.CharField(max_length=255, initial="message")
    data = forms.CharField(  # type: ignore[assignment]  # a field's name is no attribute
        strip=False, widget=forms.Textarea(attrs={"rows": 6, "class": "vLargeTextField"})
    )
    is_text = forms.BooleanField(required=False, label="The data is any text instead of JSON")

    def clean(self) -> dict[str, Any]:
        found = super().clean() or {}
        if self.errors:
            return found
        if not found["is_text"]:
            try:
                parse_json(found["data"])
            except ValueError as e:
                self.add_error("data", f"This is not JSON: {e}.")
                return found
        try:
            event = NewEvent(found["channel"], found["type"], found["data"], json_encode=False)
            found["row"] = to_row(event)
        except InvalidEvent as e:
            self.add_error(None, str(e))
        return found


@admin.register(Event)
class EventAdmin(PagesAdmin):
    """Shows the events. Register it with an admin site of your own, if you have one."""

    view_permission = _VIEW

    def get_urls(self) -> list[URLPattern]:
        wrap = self.admin_site.admin_view
        return [
            path("", wrap(self.list_view), name=f"{_URL}changelist"),
            path("<int:pk>/change/", wrap(self.event_view), name=f"{_URL}change"),
            path("channels/", wrap(self.channels_view), name=f"{_URL}channels"),
            path("state/", wrap(self.state_view), name=f"{_URL}state"),
            path("send/", wrap(self.send_view), name=f"{_URL}send"),
            path("send-again/", wrap(self.send_again_view), name=f"{_URL}send_again"),
        ]

    # Pages

    @requires(_VIEW)
    def list_view(self, request: HttpRequest) -> HttpResponse:
        form = _FilterForm(request.GET)
        page = browse.EventPage([], [], None)
        if form.is_valid():
            found = form.cleaned_data
            page = browse.list_events(
                conf.database,
                channel=found["channel"] or None,
                event_type=found["type"] or None,
                since=found["since"],
                until=found["until"],
                before=found["before"],
            )
        query = {name: value for name, value in request.GET.items() if value and name != "before"}
        return self._render(
            request,
            "events",
            "Events",
            form=form,
            page=page,
            searched=browse.SEARCHED if query.get("type") else None,
            older="" if page.older is None else "?" + urlencode({**query, "before": page.older}),
            newest="?" + urlencode(query) if "before" in request.GET else "",
        )

    @requires(_VIEW)
    def event_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        position = request.GET.get("position", "")
        event = browse.get_event(
            conf.database,
            pk,
            int(position) if position.isdecimal() and len(position) < 19 else None,
        )
        if event is None:
            raise Http404(f"There is no event {pk}: it was pruned, or was never sent.")
        return self._render(
            request, "event", f"Event {event.id or pk}", event=event, data=_indent(event.data)
        )

    @requires(_VIEW)
    def channels_view(self, request: HttpRequest) -> HttpResponse:
        first = request.GET.get("from", "")
        if "\0" in first:
            raise Http404
        page = browse.list_channels(conf.database, first)
        following = "" if page.following is None else "?" + urlencode({"from": page.following})
        return self._render(
            request, "channels", "Channels", page=page, first=first, following=following
        )

    @requires(_VIEW)
    def state_view(self, request: HttpRequest) -> HttpResponse:
        try:
            state = read_state()
        except psycopg.Error as e:
            return self._render(request, "error", "State", status=503, error=explain(e))
        # Proxies are not asked, because one that does not answer would delay the page.
        return self._render(request, "state", "State", text=render(state, judge(state)))

    # Actions

    @requires(_SEND)
    def send_view(self, request: HttpRequest) -> HttpResponse:
        form = _SendForm(request.POST if request.method == "POST" else None)
        if request.method == "POST" and form.is_valid():
            try:
                with transaction.atomic(using=conf.database):
                    event = _insert(form.cleaned_data["row"])
                    self.log_addition(request, event, "Sent as a test.")
            except DatabaseError as e:
                form.add_error(None, f"The database did not take the event: {e}")
            else:
                link = reverse(
                    f"admin:{_URL}change", args=[event.pk], current_app=self.admin_site.name
                )
                self.message_user(
                    request,
                    format_html('The <a href="{}">event</a> was sent.', link),
                    messages.SUCCESS,
                )
                return self._redirect("changelist" if request.user.has_perm(_VIEW) else "send")
        return self._render(request, "send", "Send a test event", form=form)

    @requires(_RETRY)
    def send_again_view(self, request: HttpRequest) -> HttpResponse:
        if request.method == "POST":
            try:
                with transaction.atomic(using=conf.database):
                    with connections[conf.database].cursor() as cursor:
                        cursor.execute(SEND_AGAIN)
                        count = cursor.rowcount
                    LogEntry.objects.create(
                        user_id=request.user.pk,
                        content_type=ContentType.objects.get_for_model(Event),
                        object_repr=f"{count} events",
                        action_flag=CHANGE,
                        change_message="Sent again events that the trigger had not seen.",
                    )
            except DatabaseError as e:
                self.message_user(request, f"Nothing was sent again: {e}", messages.ERROR)
            else:
                self.message_user(request, f"{count} events were sent again.", messages.SUCCESS)
            return self._redirect("send_again")
        return self._render(request, "send_again", "Send again", statement=SEND_AGAIN)

    def _redirect(self, view: str) -> HttpResponse:
        return self.redirect(f"{_URL}{view}")

    def _render(
        self, request: HttpRequest, template: str, title: str, *, status: int = 200, **context: Any
    ) -> HttpResponse:
        may = {
            "may_view": request.user.has_perm(_VIEW),
            "may_send": request.user.has_perm(_SEND),
            "may_retry": request.user.has_perm(_RETRY),
        }
        return self.render(request, template, title, status=status, **may, **context)


def _insert(row: Row) -> Event:
    """Send the event. Not with `Event.save`, which needs rights that a sender does not have."""
    channel, event_type, data, _, meta = row
    columns, values = "channel, type, data", [channel, event_type, data]
    if meta is not None:
        columns, values = f"{columns}, meta", [*values, meta]
    with connections[conf.database].cursor() as cursor:
        cursor.execute(
            f"INSERT INTO pg_eventstream_event ({columns})"  # noqa: S608
            f" VALUES ({', '.join(['%s'] * len(values))}) RETURNING id",
            values,
        )
        (pk,) = cursor.fetchone()
    return Event(id=pk, channel=channel, type=event_type, data=data)


def _indent(data: str) -> str:
    """JSON with line breaks, for reading; other data unchanged."""
    try:
        return json.dumps(parse_json(data), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return data
