from pathlib import Path

import django.db.models.functions.datetime
from django.db import migrations, models

import pg_eventstream.models
from pg_eventstream.tables import placement

SQL = Path(pg_eventstream.models.__file__).with_name("sql")


def text_of(name: str) -> str:
    return (SQL / name).read_text(encoding="utf-8")


class Migration(placement.Migration):
    dependencies = [("pg_eventstream", "0006_slices")]

    operations = [
        migrations.AddField(
            model_name="event",
            name="meta",
            field=models.JSONField(
                blank=True,
                null=True,
                help_text=(
                    "About the event, and never sent to clients: trace, correlation, versions."
                ),
            ),
        ),
        migrations.AddField(
            model_name="stream",
            name="committed_at",
            field=models.DateTimeField(null=True, help_text="As in the outbox."),
        ),
        # In two steps: a column that is added with this default would be written to every row.
        migrations.AddField(
            model_name="outbox",
            name="committed_at",
            field=models.DateTimeField(
                null=True, help_text="When the trigger ran, at COMMIT. Null if it was an older one."
            ),
        ),
        migrations.AlterField(
            model_name="outbox",
            name="committed_at",
            field=models.DateTimeField(
                db_default=pg_eventstream.models.ClockTimestamp(),
                null=True,
                help_text="When the trigger ran, at COMMIT. Null if it was an older one.",
            ),
        ),
        migrations.CreateModel(
            name="Report",
            fields=[
                ("name", models.TextField(primary_key=True, serialize=False)),
                (
                    "at",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
                ),
                ("content", models.JSONField()),
            ],
            options={"abstract": False},
        ),
        migrations.AlterModelOptions(
            name="event",
            options={
                "permissions": [
                    ("send_event", "Can send a test event"),
                    ("retry_event", "Can send events again that were never put in order"),
                ]
            },
        ),
        migrations.RunSQL(text_of("0007_sequence.sql"), text_of("0006_slices.sql")),
    ]
