"""The table of the packages that pg_eventstream is compared with."""

from __future__ import annotations

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models.functions import Now

from .settings import PACKAGE


class Message(models.Model):
    """A row with the columns of an event. The trigger of django-pgpubsub notifies of each."""

    id = models.BigAutoField(primary_key=True)
    channel = models.CharField(max_length=255)
    type = models.CharField(max_length=255, default="message", db_default="message")
    data = models.TextField()
    skip_user_ids = ArrayField(models.TextField(), default=list, db_default=[])
    created = models.DateTimeField(db_default=Now())

    class Meta:
        app_label = "project"

    def __str__(self) -> str:
        return self.data


if PACKAGE == "pgpubsub":
    from dataclasses import dataclass
    from importlib import import_module

    from .. import consuming

    _pgpubsub = import_module(PACKAGE)

    @dataclass
    class MessageChannel(_pgpubsub.TriggerChannel):  # type: ignore[name-defined,misc]
        model = Message
        lock_notifications = True  # as its documentation advises for exactly once

    @_pgpubsub.post_insert_listener(MessageChannel)  # type: ignore[untyped-decorator]
    def _heard(old: Message, new: Message) -> None:
        """What a consumer does in the benchmark `consume`."""
        consuming.handle(new.pk)
