from pathlib import Path

import django.db.models.functions.datetime
from django.db import migrations, models

import pg_eventstream.models
from pg_eventstream.tables import placement

SQL = Path(pg_eventstream.models.__file__).with_name("sql")


def text_of(name: str) -> str:
    return (SQL / name).read_text(encoding="utf-8")


class Migration(placement.Migration):
    # One table per migration: see 0003. (Nobody waits for a new one.)

    dependencies = [("pg_eventstream", "0008_outbox_committed_at")]

    operations = [
        placement.lock_table("pg_eventstream_stream"),
        migrations.AddField(
            model_name="stream",
            name="committed_at",
            field=models.DateTimeField(null=True, help_text="As in the outbox."),
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
        migrations.RunSQL(text_of("0009_sequence.sql"), text_of("0006_slices.sql")),
    ]
