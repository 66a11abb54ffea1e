from django.db import migrations, models

import pg_eventstream.models
from pg_eventstream.tables import placement


class Migration(placement.Migration):
    # One table per migration: see 0003.

    dependencies = [("pg_eventstream", "0007_event_meta")]

    operations = [
        placement.lock_table("pg_eventstream_outbox"),
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
    ]
