from pathlib import Path

from django.db import migrations, models

import pg_eventstream.models
from pg_eventstream.tables import placement

SQL = Path(pg_eventstream.models.__file__).with_name("sql")


def text_of(name: str) -> str:
    return (SQL / name).read_text(encoding="utf-8")


class Migration(placement.Migration):
    dependencies = [("pg_eventstream", "0005_incarnation")]

    operations = [
        # Before all else here, so that nobody sequences meanwhile.
        migrations.AddField(
            model_name="cursor",
            name="until",
            field=pg_eventstream.models.SnapshotField(null=True),
        ),
        migrations.AddField(
            model_name="cursor",
            name="done",
            field=models.BigIntegerField(null=True),
        ),
        # Where nothing has been sent yet, all transactions are new, and of this cluster.
        migrations.RunSQL(
            "UPDATE pg_eventstream_cursor\n"
            "   SET snapshot = '3:3:',\n"
            "       cluster = (SELECT system_identifier FROM pg_control_system())\n"
            " WHERE position = 0 AND cluster = 0 AND place = ''\n"
            "   AND NOT EXISTS (SELECT FROM pg_eventstream_outbox)\n"
            "   AND NOT EXISTS (SELECT FROM pg_eventstream_stream)",
            # Back again, a backlog that is half done: what is new is looked for in the stream.
            "UPDATE pg_eventstream_cursor SET cluster = 0 WHERE until IS NOT NULL",
        ),
        migrations.RunSQL(text_of("0006_slices.sql"), text_of("0005_sequence.sql")),
    ]
