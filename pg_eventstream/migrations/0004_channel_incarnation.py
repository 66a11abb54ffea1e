from django.db import migrations, models

from pg_eventstream.tables import placement


class Migration(placement.Migration):
    dependencies = [("pg_eventstream", "0003_stream_incarnation")]

    operations = [
        migrations.AddField(
            model_name="channel",
            name="incarnation",
            field=models.BigIntegerField(db_default=0, help_text="Of the last event pruned."),
        ),
    ]
