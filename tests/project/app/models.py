from django.db import models


class Membership(models.Model):
    """A user who may read a channel; without a user, all visitors who are not logged in."""

    user_id = models.BigIntegerField(null=True)
    channel = models.CharField(max_length=255)

    def __str__(self) -> str:
        return f"{self.user_id} reads {self.channel}"


class Counter(models.Model):
    """A row for which transactions compete."""

    name = models.CharField(max_length=50, unique=True)
    value = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.name}={self.value}"
