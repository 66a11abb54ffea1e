"""The streams, and a view that sends events."""

from __future__ import annotations

import threading
import time
from importlib import import_module

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.urls import include, path

from .settings import PACKAGE

_TEXT = "a line of a chat, as long as such lines are; " * 2

if PACKAGE == "pg_eventstream":
    from pg_eventstream import send_event

    def send_one(channel: str, data: dict[str, object], committed: list[float]) -> None:
        with transaction.atomic():
            send_event(channel, "message", data)
            transaction.on_commit(lambda: committed.append(time.monotonic()))

else:
    from django.db.models.signals import post_save

    _peer = import_module(PACKAGE)
    _local = threading.local()

    def send_one(channel: str, data: dict[str, object], committed: list[float]) -> None:
        # It commits, and then passes the event to the streams. In the caller's transaction it would
        # pass the event on before the commit.
        _peer.send_event(channel, "message", data)
        committed.append(_local.committed)

    def _saved(sender: type, **_: object) -> None:
        if sender.__name__ == "Event":
            transaction.on_commit(lambda: setattr(_local, "committed", time.monotonic()))

    post_save.connect(_saved)


def send(request: HttpRequest) -> JsonResponse:
    """Send events numbered from `first`, one per transaction. Returns the times of the commits."""
    committed: list[float] = []
    first, count = int(request.GET["first"]), int(request.GET["count"])
    text = _TEXT * int(request.GET.get("length", 1))
    for n in range(first, first + count):
        send_one("room", {"n": n, "text": text}, committed)
    return JsonResponse({"committed": committed[-count:]})


urlpatterns = [path("events/", include(f"{PACKAGE}.urls")), path("send/", send)]
