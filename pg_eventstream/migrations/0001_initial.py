from pathlib import Path

import django.contrib.postgres.fields
import django.db.models.deletion
import django.db.models.functions.datetime
import pgtrigger.compiler
import pgtrigger.migrations
from django.db import migrations, models

import pg_eventstream.models
from pg_eventstream.tables import placement

SQL = Path(pg_eventstream.models.__file__).with_name("sql")


def run_file(name: str, reverse: str) -> migrations.RunSQL:
    return migrations.RunSQL((SQL / name).read_text(encoding="utf-8"), reverse)


class Migration(placement.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Event",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("channel", models.CharField(max_length=255)),
                (
                    "type",
                    models.CharField(db_default="message", default="message", max_length=255),
                ),
                (
                    "data",
                    models.TextField(help_text="What goes on the wire: JSON, or any other text."),
                ),
                (
                    "skip_user_ids",
                    django.contrib.postgres.fields.ArrayField(
                        base_field=models.TextField(), db_default=[], default=list, size=None
                    ),
                ),
                (
                    "created",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
                ),
            ],
            options={
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(("channel__regex", "^[^\\r\\n]+$")),
                        name="pg_eventstream_channel_not_empty_no_cr_no_lf",
                        violation_error_message=(
                            "A channel name may not be empty or contain CR or LF."
                        ),
                    ),
                    models.CheckConstraint(
                        condition=models.Q(("type__regex", "^[^\\r\\n]+$")),
                        name="pg_eventstream_type_not_empty_no_cr_no_lf",
                        violation_error_message=(
                            "An event type may not be empty (leave it out for 'message')"
                            " or contain CR or LF."
                        ),
                    ),
                    models.CheckConstraint(
                        condition=pg_eventstream.models.PlainList("skip_user_ids"),
                        name="pg_eventstream_skip_user_ids_plain",
                        violation_error_message="User ids to skip may not be NULL or nested.",
                    ),
                ],
            },
        ),
        migrations.CreateModel(
            name="Outbox",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "xid",
                        "seq",
                        blank=True,
                        editable=False,
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                ("xid", pg_eventstream.models.Xid8Field()),
                ("seq", models.BigIntegerField()),
                (
                    "event",
                    models.ForeignKey(
                        db_constraint=False,
                        db_index=False,
                        on_delete=django.db.models.deletion.DO_NOTHING,
                        related_name="+",
                        to="pg_eventstream.event",
                    ),
                ),
                ("channel", models.CharField(max_length=255)),
            ],
        ),
        migrations.CreateModel(
            name="Stream",
            fields=[
                ("position", models.BigIntegerField(primary_key=True, serialize=False)),
                ("eid", models.BigIntegerField()),
                (
                    "event",
                    models.ForeignKey(
                        db_constraint=False,
                        db_index=False,
                        on_delete=django.db.models.deletion.DO_NOTHING,
                        related_name="+",
                        to="pg_eventstream.event",
                    ),
                ),
                (
                    "sequenced_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
                ),
                ("channel", models.CharField(max_length=255)),
            ],
            options={
                "constraints": [
                    models.UniqueConstraint(
                        fields=("channel", "eid"), name="pg_eventstream_stream_eid"
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="Channel",
            fields=[
                ("name", models.CharField(max_length=255, primary_key=True, serialize=False)),
                ("pruned", models.BigIntegerField()),
            ],
        ),
        migrations.CreateModel(
            name="Cursor",
            fields=[
                ("position", models.BigIntegerField(primary_key=True, serialize=False)),
                ("snapshot", pg_eventstream.models.SnapshotField()),
                ("cluster", models.BigIntegerField()),
            ],
        ),
        migrations.CreateModel(
            name="Publisher",
            fields=[
                (
                    "id",
                    models.SmallIntegerField(default=1, primary_key=True, serialize=False),
                ),
                ("name", models.TextField(help_text="host:pid")),
                ("leading_since", models.DateTimeField()),
                ("heartbeat", models.DateTimeField()),
            ],
        ),
        migrations.CreateModel(
            name="Proxy",
            fields=[
                (
                    "name",
                    models.TextField(
                        help_text="The control URI, without credentials.",
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                ("position", models.BigIntegerField()),
            ],
        ),
        run_file(
            "0001_outbox.sql",
            "ALTER TABLE pg_eventstream_outbox ALTER COLUMN seq DROP IDENTITY",
        ),
        run_file("0001_enqueue.sql", "DROP FUNCTION pg_eventstream_enqueue()"),
        run_file(
            "0001_sequence.sql",
            "DROP FUNCTION pg_eventstream_sequence()",
        ),
        pgtrigger.migrations.AddTrigger(
            model_name="event",
            trigger=pgtrigger.compiler.Trigger(
                name="enqueue",
                sql=pg_eventstream.models.EnqueueSql(
                    constraint="CONSTRAINT",
                    execute="pg_eventstream_enqueue()",
                    func="",
                    hash="1a783f7189e7fdbe5e7c15d1767b5bc4cd4edde4",
                    operation="INSERT",
                    pgid="pgtrigger_enqueue_3f3f6",
                    table="pg_eventstream_event",
                    timing="DEFERRABLE INITIALLY DEFERRED",
                    when="AFTER",
                ),
            ),
        ),
    ]
