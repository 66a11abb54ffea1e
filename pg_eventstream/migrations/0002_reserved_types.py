from pathlib import Path

from django.contrib.postgres.operations import AddConstraintNotValid
from django.db import migrations, models

import pg_eventstream.models
from pg_eventstream.tables import placement

SQL = Path(pg_eventstream.models.__file__).with_name("sql")


class Migration(placement.Migration):
    dependencies = [("pg_eventstream", "0001_initial")]

    operations = [
        migrations.RunSQL(
            (SQL / "0002_lock_event.sql").read_text(encoding="utf-8"), migrations.RunSQL.noop
        ),
        # Older rows are let be, and are pruned in their time.
        AddConstraintNotValid(
            model_name="event",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    (
                        "type__in",
                        (
                            "stream-open",
                            "stream-reset",
                            "stream-error",
                            "keep-alive",
                            "event-erased",
                        ),
                    ),
                    _negated=True,
                ),
                name="pg_eventstream_type_not_reserved",
                violation_error_message=(
                    "An event type may not be one of the library's own: stream-open,"
                    " stream-reset, stream-error, keep-alive, event-erased."
                ),
            ),
        ),
    ]
