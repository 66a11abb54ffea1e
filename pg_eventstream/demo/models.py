from __future__ import annotations

from typing import ClassVar

from django.db import models


class Counter(models.Model):
    """A number that the demo's transactions change when they send an event."""

    name = models.CharField(max_length=20, primary_key=True)
    value = models.BigIntegerField(default=0)

    objects: ClassVar[models.Manager[Counter]] = models.Manager()

    def __str__(self) -> str:
        return f"{self.name} = {self.value}"
