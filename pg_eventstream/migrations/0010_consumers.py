from pathlib import Path
from typing import Any

import django.contrib.postgres.fields
import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models

import pg_eventstream.models
from pg_eventstream.tables import placement

SQL = Path(pg_eventstream.models.__file__).with_name("sql")


def text_array(**kwargs: Any) -> Any:
    return django.contrib.postgres.fields.ArrayField(
        base_field=models.TextField(), db_default=[], default=list, size=None, **kwargs
    )


def consumer() -> Any:
    return models.ForeignKey(
        db_constraint=False,
        db_index=False,
        on_delete=django.db.models.deletion.DO_NOTHING,
        related_name="+",
        to="pg_eventstream.consumer",
    )


class Migration(placement.Migration):
    # It only creates tables and functions, so no other session has to wait.

    dependencies = [("pg_eventstream", "0009_stream_committed_at")]

    operations = [
        migrations.CreateModel(
            name="Consumer",
            fields=[
                ("id", models.AutoField(primary_key=True, serialize=False)),
                ("name", models.CharField(max_length=255, unique=True)),
                (
                    "former_names",
                    text_array(help_text="Code that has one of these is too old to run."),
                ),
                (
                    "channels",
                    text_array(help_text="With no prefixes either, it handles all channels."),
                ),
                ("prefixes", text_array()),
                ("paused", models.BooleanField(db_default=False, default=False)),
                (
                    "epoch",
                    models.BigIntegerField(
                        db_default=0,
                        default=0,
                        help_text="Increases when anything but handling changes it.",
                    ),
                ),
                (
                    "created",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
                ),
            ],
            options={
                "permissions": [
                    ("operate_consumer", "Can pause, resume, reset and remove consumers")
                ]
            },
        ),
        migrations.CreateModel(
            name="Checkpoint",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "consumer_id",
                        "slot",
                        "epoch",
                        "position",
                        blank=True,
                        editable=False,
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                ("slot", models.SmallIntegerField()),
                ("epoch", models.BigIntegerField()),
                ("position", models.BigIntegerField()),
                (
                    "incarnation",
                    models.BigIntegerField(help_text="In which this position counts."),
                ),
                ("consumer", consumer()),
            ],
            options={"abstract": False},
        ),
        migrations.CreateModel(
            name="Slot",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "consumer_id",
                        "slot",
                        blank=True,
                        editable=False,
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                ("slot", models.SmallIntegerField()),
                (
                    "holder",
                    models.TextField(
                        db_default="",
                        default="",
                        help_text="host:pid of who handles its events. Empty if it stopped in"
                        " order.",
                    ),
                ),
                ("heartbeat", models.DateTimeField(null=True)),
                (
                    "failing",
                    models.BigIntegerField(
                        help_text="The position of the event whose attempts are counted.",
                        null=True,
                    ),
                ),
                ("attempts", models.IntegerField(db_default=0, default=0)),
                ("error", models.TextField(db_default="", default="")),
                (
                    "retry_at",
                    models.DateTimeField(
                        help_text="Null if it is stopped, or nothing fails.", null=True
                    ),
                ),
                ("stopped", models.BooleanField(db_default=False, default=False)),
                (
                    "lost",
                    models.BigIntegerField(
                        help_text="The last event that was pruned before this slot could handle"
                        " it.",
                        null=True,
                    ),
                ),
                (
                    "replay_to",
                    models.BigIntegerField(
                        help_text="Events up to this position had been handled before a reset.",
                        null=True,
                    ),
                ),
                ("consumer", consumer()),
            ],
            options={"abstract": False},
        ),
        migrations.CreateModel(
            name="Parked",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("slot", models.SmallIntegerField()),
                ("position", models.BigIntegerField()),
                ("channel", models.CharField(max_length=255)),
                ("number", models.BigIntegerField(help_text="The number in the event's id.")),
                ("type", models.CharField(max_length=255)),
                ("data", models.TextField()),
                ("meta", models.JSONField(null=True)),
                ("created", models.DateTimeField()),
                ("committed_at", models.DateTimeField(null=True)),
                ("error", models.TextField()),
                ("traceback", models.TextField()),
                ("attempts", models.IntegerField()),
                (
                    "parked_at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
                ),
                (
                    "retry",
                    models.BooleanField(
                        db_default=False,
                        default=False,
                        help_text="Whether the slot's holder shall try it again.",
                    ),
                ),
                ("consumer", consumer()),
            ],
            options={
                "permissions": [("retry_parked", "Can retry and skip parked events")],
                "constraints": [
                    models.UniqueConstraint(
                        fields=("consumer", "channel", "position"),
                        name="pg_eventstream_parked_event",
                    )
                ],
            },
        ),
        migrations.RunSQL(
            (SQL / "0010_consumers.sql").read_text(encoding="utf-8"),
            """
            DROP FUNCTION pg_eventstream_consumer_page;
            DROP FUNCTION pg_eventstream_lock_checkpoints;
            DROP FUNCTION pg_eventstream_move_checkpoints;
            """,
        ),
    ]
