"""The tables. `Event` is the public contract: an INSERT into it sends an event.

Senders only ever insert; they take no lock that another sender waits for.
Everything behind `Event` is written by the database functions in ``sql/`` and by
the publisher, never by application code.
"""

from __future__ import annotations

from typing import Any

import pgtrigger
from django.apps import apps
from django.contrib.postgres.fields import ArrayField
from django.core.checks import CheckMessage
from django.core.exceptions import ImproperlyConfigured
from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.functions import Now
from pgtrigger import compiler

from .sse import RESERVED_TYPES
from .tables.fixtures import Loadable, forget_cursor, load_outbox_row, may_take_place

if not apps.is_installed("pgtrigger"):
    # Without it Django would refuse the attribute "triggers" below, and not say why.
    raise ImproperlyConfigured(
        'pg_eventstream needs django-pgtrigger: Add "pgtrigger" to INSTALLED_APPS.'
    )


class Xid8Field(models.BigIntegerField):  # type: ignore[type-arg]
    """A transaction id that never wraps around (PostgreSQL: xid8)."""

    def db_type(self, connection: Any) -> str:
        return "xid8"

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> int | None:
        return None if value is None else int(value)

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        # As text, which PostgreSQL takes for any type. It casts no number to xid8.
        value = super().get_db_prep_value(value, connection, prepared)
        return str(value) if isinstance(value, int) else value


class SnapshotField(models.TextField):  # type: ignore[type-arg]
    """Which transactions were finished at one moment (PostgreSQL: pg_snapshot)."""

    def db_type(self, connection: Any) -> str:
        return "pg_snapshot"


class TextArrayField(ArrayField):  # type: ignore[type-arg]
    """An array of text. Migrations know it as the ArrayField that it is.

    Since 6.1 Django wants ``django.contrib.postgres`` installed for one (check postgres.E005).
    That app has nothing that this needs, and projects without it shall not have to add it.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"base_field": models.TextField(), **kwargs})

    def check(self, **kwargs: Any) -> list[CheckMessage]:
        return [found for found in super().check(**kwargs) if found.id != "postgres.E005"]

    def deconstruct(self) -> Any:
        name, _, args, kwargs = super().deconstruct()
        return name, "django.contrib.postgres.fields.ArrayField", args, kwargs


class EnqueueSql(compiler.UpsertTriggerSql):
    """The trigger and nothing else.

    django-pgtrigger would create two functions as well that our trigger does not call, one
    of them in the schema ``public`` or ``PGTRIGGER_SCHEMA``. The owner of the tables may have
    no rights there, and the migration would differ from project to project.
    """

    def get_template(self) -> str:
        return """
            DROP TRIGGER IF EXISTS {pgid} ON {table};
            CREATE {constraint} TRIGGER {pgid}
                {when} {operation} ON {table}
                {timing}
                FOR EACH {level}
                EXECUTE FUNCTION {execute};

            COMMENT ON TRIGGER {pgid} ON {table} IS '{hash}';
        """


class PlainList(models.Func):
    """Whether an array is a list of values, without NULLs and not nested."""

    template = (
        "(coalesce(array_ndims(%(expressions)s), 1) = 1"
        " AND array_position(%(expressions)s, NULL) IS NULL)"
    )
    output_field = models.BooleanField()


class EnqueueAtCommit(pgtrigger.Trigger):
    """Calls ``pg_eventstream_enqueue()`` for each event when its transaction commits.

    The trigger executes our own function instead of the one that django-pgtrigger
    generates: it must run with its owner's rights, cannot be called by hand, and
    is not switched off by ``pgtrigger.ignore()``, which would lose events silently.
    """

    when = pgtrigger.After
    operation = pgtrigger.Insert
    level = pgtrigger.Row
    timing = pgtrigger.Deferred

    def compile(self, model: models.Model) -> compiler.Trigger:
        return compiler.Trigger(
            name=self.name,
            sql=EnqueueSql(
                pgid=self.get_pgid(model),
                func="",
                table=model._meta.db_table,
                constraint="CONSTRAINT",
                when=self.when,
                operation=self.operation,
                timing=f"DEFERRABLE INITIALLY {self.timing}",
                execute="pg_eventstream_enqueue()",
            ),
        )


ENQUEUE = EnqueueAtCommit(name="enqueue")


class Event(models.Model):
    """What was said, on which channel. Immutable: inserted once, deleted by the sweep."""

    id = models.BigAutoField(primary_key=True)
    channel = models.CharField(max_length=255)
    type = models.CharField(max_length=255, default="message", db_default="message")
    data = models.TextField(help_text="What goes on the wire: JSON, or any other text.")
    skip_user_ids = TextArrayField(default=list, db_default=[])
    created = models.DateTimeField(db_default=Now())

    class Meta:
        constraints = [
            # One per column: PostgreSQL reads each anew for every INSERT (ExecRelCheck).
            models.CheckConstraint(
                name="pg_eventstream_channel_not_empty_no_cr_no_lf",
                condition=models.Q(channel__regex=r"^[^\r\n]+$"),
                violation_error_message="A channel name may not be empty or contain CR or LF.",
            ),
            models.CheckConstraint(
                name="pg_eventstream_type_not_empty_no_cr_no_lf",
                condition=models.Q(type__regex=r"^[^\r\n]+$"),
                violation_error_message=(
                    "An event type may not be empty (leave it out for 'message')"
                    " or contain CR or LF."
                ),
            ),
            # Apart from the one above, so that it can be NOT VALID: there may be older rows.
            models.CheckConstraint(
                name="pg_eventstream_type_not_reserved",
                condition=~models.Q(type__in=RESERVED_TYPES),
                violation_error_message=(
                    "An event type may not be one of the library's own:"
                    f" {', '.join(RESERVED_TYPES)}."
                ),
            ),
            models.CheckConstraint(
                name="pg_eventstream_skip_user_ids_plain",
                condition=PlainList("skip_user_ids"),
                violation_error_message="User ids to skip may not be NULL or nested.",
            ),
        ]
        triggers = [ENQUEUE]

    def __str__(self) -> str:
        return f"{self.type} on {self.channel}"


class Outbox(Loadable):
    """Events whose transactions committed, in commit order: written at COMMIT.

    The key begins with the transaction id, so that one index answers "what has been
    committed since that snapshot". Swept as soon as all its transactions are sequenced.
    """

    pk = models.CompositePrimaryKey("xid", "seq")
    xid = Xid8Field()
    seq = models.BigIntegerField()
    event = models.ForeignKey(
        Event, on_delete=models.DO_NOTHING, db_constraint=False, db_index=False, related_name="+"
    )
    channel = models.CharField(max_length=255)

    def __str__(self) -> str:
        return f"event {self.event_id}, committed by {self.xid}"

    def load(self, connection: BaseDatabaseWrapper) -> bool:
        load_outbox_row(connection, self.event_id, self.seq, ENQUEUE.get_pgid(Event))  # type: ignore[arg-type]
        return False


class Stream(Loadable):
    """The sequenced events: position is their global order, eid their order in the channel.

    An id shows eid + incarnation, see `Cursor`.
    """

    position = models.BigIntegerField(primary_key=True)
    eid = models.BigIntegerField()
    event = models.ForeignKey(
        Event, on_delete=models.DO_NOTHING, db_constraint=False, db_index=False, related_name="+"
    )
    sequenced_at = models.DateTimeField(db_default=Now())
    channel = models.CharField(max_length=255)
    incarnation = models.BigIntegerField(null=True, help_text="Null for the first, which is 0.")
    prev = models.BigIntegerField(
        null=True,
        help_text="What the id of the event before it shows, if that is of another incarnation.",
    )

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["channel", "eid"], name="pg_eventstream_stream_eid")
        ]

    def __str__(self) -> str:
        return f"{self.channel}:{self.eid}"

    def load(self, connection: BaseDatabaseWrapper) -> bool:
        place = (self.position, self.channel, self.eid, self.event_id)
        if not may_take_place(connection, *place):
            return False
        forget_cursor(connection)
        return True


class Channel(Loadable):
    """Up to which eid the events of a channel are pruned, where its rows do not tell.

    Never deleted: an idle channel must not restart at 1 while clients hold ids of it.
    """

    name = models.CharField(max_length=255, primary_key=True)
    pruned = models.BigIntegerField()
    incarnation = models.BigIntegerField(db_default=0, help_text="Of the last event pruned.")

    def __str__(self) -> str:
        return self.name

    def load(self, connection: BaseDatabaseWrapper) -> bool:
        here = Channel.objects.using(connection.alias)
        return not here.filter(pk=self.pk, pruned__gte=self.pruned).exists()


class Cursor(Loadable):
    """How far the sequence is: one row.

    The snapshot up to which everything is sequenced, the last position, and the cluster that
    the snapshot's transaction ids belong to.

    The stream begins a new incarnation when it may have lost events whose ids clients hold: after
    a restore, a failover, or when tables were emptied. What ids show is then higher by a random
    multiple of 10^12, so no id is used twice. ``place`` is where this incarnation was written
    (database, timeline of the WAL, files of the tables), ``began`` the last position before it.

    A backlog is sequenced in slices. As long as there is one, ``until`` is the snapshot that it
    ends with, and of the transactions that ``snapshot`` lists as unfinished all events up to the
    seq ``done`` are sequenced.
    """

    position = models.BigIntegerField(primary_key=True)
    snapshot = SnapshotField()
    cluster = models.BigIntegerField()
    incarnation = models.BigIntegerField(db_default=0)
    began = models.BigIntegerField(db_default=0)
    place = models.TextField(db_default="")
    until = SnapshotField(null=True)
    done = models.BigIntegerField(null=True)

    def __str__(self) -> str:
        return f"sequenced up to {self.position}"


class Publisher(Loadable):
    """Which publisher leads: one row, kept by the leader."""

    id = models.SmallIntegerField(primary_key=True, default=1)
    name = models.TextField(help_text="host:pid")
    leading_since = models.DateTimeField()
    heartbeat = models.DateTimeField()

    def __str__(self) -> str:
        return self.name


class Proxy(Loadable):
    """Up to which position a GRIP proxy has acknowledged the stream."""

    name = models.TextField(primary_key=True, help_text="The control URI, without credentials.")
    position = models.BigIntegerField()
    incarnation = models.BigIntegerField(db_default=0, help_text="In which this position counts.")

    def __str__(self) -> str:
        return self.name
