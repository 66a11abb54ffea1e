from django.db import migrations, models

from pg_eventstream.tables import placement


class Migration(placement.Migration):
    # One table per migration, hence per transaction: whoever works on the stream locks its tables
    # in an order of his own, and no lock here may wait for another.

    dependencies = [("pg_eventstream", "0002_reserved_types")]

    operations = [
        migrations.AddField(
            model_name="stream",
            name="incarnation",
            field=models.BigIntegerField(help_text="Null for the first, which is 0.", null=True),
        ),
        migrations.AddField(
            model_name="stream",
            name="prev",
            field=models.BigIntegerField(
                help_text=(
                    "What the id of the event before it shows, if that is of another incarnation."
                ),
                null=True,
            ),
        ),
    ]
