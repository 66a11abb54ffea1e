from django.apps import AppConfig
from django.db.models.signals import pre_migrate


class PgEventStreamConfig(AppConfig):
    name = "pg_eventstream"
    verbose_name = "Event stream"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # The first two register the system checks.
        from . import checks, database_checks, unmigrated  # noqa: F401

        pre_migrate.connect(unmigrated.create_tables, sender=self)
