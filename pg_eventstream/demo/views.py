"""The page, the transaction that its buttons run, and what the database knows afterwards."""

from __future__ import annotations

from django.db import connection, transaction
from django.db.models import Min
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST, require_safe

from pg_eventstream import send_event
from pg_eventstream.demo import settings
from pg_eventstream.demo.models import Counter
from pg_eventstream.models import Event, Proxy, Stream

CHANNEL = "demo"
_COUNTER = "page"
_LONGEST_TEXT = 200
_POLICY = (
    "default-src 'none'; script-src 'self'; img-src data:; style-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@require_safe
@never_cache
def page(request: HttpRequest) -> HttpResponse:
    response = render(
        request,
        "pg_eventstream_demo/index.html",
        {
            "channel": CHANNEL,
            "counter": Counter.objects.get_or_create(name=_COUNTER)[0].value,
            "longest_text": _LONGEST_TEXT,
            "proxied": settings.PROXIED,
            "psql": f"{settings.PSQL} {settings.DSN}",
        },
    )
    response["Content-Security-Policy"] = _POLICY
    return response


@require_POST
def send(request: HttpRequest) -> JsonResponse:
    """Run one transaction: add 1 to the counter, send an event, then commit or roll back."""
    rolls_back = request.POST.get("how") == "rollback"
    with transaction.atomic():
        counter = Counter.objects.select_for_update().get(name=_COUNTER)
        before = counter.value
        counter.value += 1
        counter.save()
        send_event(
            CHANNEL,
            "counted",
            {
                "text": request.POST.get("text", "")[:_LONGEST_TEXT],
                "value": counter.value,
                "token": request.POST.get("token", "")[:64],
            },
        )
        event_id = _id_of_last_event()
        transaction.set_rollback(rolls_back)
    return JsonResponse(
        {
            "event_id": event_id,
            "before": before,
            "inside": counter.value,
            "after": Counter.objects.get(name=_COUNTER).value,
        }
    )


@require_safe
@never_cache
def seen(request: HttpRequest, event_id: int) -> JsonResponse:
    """What PostgreSQL knows about an event, and the publisher if there is one."""
    place = Stream.objects.filter(channel=CHANNEL, event_id=event_id).first()
    return JsonResponse(
        {
            "row": Event.objects.filter(id=event_id).exists(),
            "id": None if place is None else str(place),
            "published": place is not None and _is_published(place),
        }
    )


def _is_published(place: Stream) -> bool:
    if not settings.PROXIED:
        return True  # the application streams every event that has a place
    acknowledged = Proxy.objects.aggregate(position=Min("position"))["position"]
    return acknowledged is not None and place.position <= acknowledged


def _id_of_last_event() -> int:
    """The row id of this session's last event, committed or not."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT currval(pg_get_serial_sequence('pg_eventstream_event', 'id'))")
        return int(cursor.fetchone()[0])
