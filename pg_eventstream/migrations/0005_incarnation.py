from pathlib import Path

from django.db import migrations, models

import pg_eventstream.models
from pg_eventstream.tables import placement

SQL = Path(pg_eventstream.models.__file__).with_name("sql")


def text_of(name: str) -> str:
    return (SQL / name).read_text(encoding="utf-8")


class Migration(placement.Migration):
    dependencies = [("pg_eventstream", "0004_channel_incarnation")]

    operations = [
        # Before all else here, so that nobody sequences meanwhile.
        migrations.AddField(
            model_name="cursor",
            name="incarnation",
            field=models.BigIntegerField(db_default=0),
        ),
        migrations.AddField(
            model_name="cursor",
            name="began",
            field=models.BigIntegerField(db_default=0),
        ),
        migrations.AddField(
            model_name="cursor",
            name="place",
            field=models.TextField(db_default=""),
        ),
        migrations.AddField(
            model_name="proxy",
            name="incarnation",
            field=models.BigIntegerField(db_default=0, help_text="In which this position counts."),
        ),
        # A row that is missing later on is missing because tables were emptied. The cluster 0
        # is none, so the first call takes what it finds in the outbox.
        migrations.RunSQL(
            "INSERT INTO pg_eventstream_cursor (position, snapshot, cluster)\n"
            "SELECT 0, pg_current_snapshot(), 0\n"
            " WHERE NOT EXISTS (SELECT FROM pg_eventstream_cursor)",
            "DELETE FROM pg_eventstream_cursor WHERE cluster = 0",
        ),
        migrations.RunSQL(
            text_of("0005_sequence.sql"),
            text_of("0001_sequence.sql").replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION"),
        ),
    ]
