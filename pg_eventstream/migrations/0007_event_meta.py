from django.db import migrations, models

from pg_eventstream.tables import placement


class Migration(placement.Migration):
    # One table per migration: see 0003.

    dependencies = [("pg_eventstream", "0006_slices")]

    operations = [
        placement.lock_table("pg_eventstream_event"),
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
        migrations.AlterModelOptions(
            name="event",
            options={
                "permissions": [
                    ("send_event", "Can send a test event"),
                    ("retry_event", "Can send events again that were never put in order"),
                ]
            },
        ),
    ]
